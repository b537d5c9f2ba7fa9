"""One browser for each file of page tests, and sites that end with their test."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio
from browser import chromium, find_chromium
from playwright.async_api import Browser


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncGenerator[Browser]:
    """A headless Chromium; the tests that need one are skipped where there is none."""
    if find_chromium() is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    async with chromium() as started:
        yield started
