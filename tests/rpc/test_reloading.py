"""Reading the configuration again: what a running core makes of its file when that has changed, or was lost."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path

import pytest
from moltbot_server.app import Core
from moltbot_server.config import Autoscaling, Settings, load_settings
from moltbot_server.config_keys import KEYS
from moltbot_server.errors import InvalidConfiguration
from moltbot_server.models.catalog import Catalog
from moltbot_server.reloading import LIVE
from moltbot_server.testing import ScriptedEngine
from moltbot_server.workspace import Workspace

ROUTE = "models: {primary: scripted}\n"
FLAGS = {"port": 0, "grpc_port": 0, "metrics_port": 0}


@asynccontextmanager
async def running(folder: Path, text: str, environ: Mapping[str, str] | None = None) -> AsyncIterator[Core]:
    """Run a core by a `moltbot.yaml`, and by flags such as `moltbot start` gives to its core."""
    workspace = Workspace(folder=folder)
    workspace.create()
    workspace.config_file.write_text(text)
    reread = partial(load_settings, folder, environ or {}, FLAGS, current=folder)
    core = Core(reread(), key=workspace.read_key(), catalog=Catalog([ScriptedEngine()]), reread=reread)
    await core.start()
    try:
        yield core
    finally:
        await core.stop(1.0)


async def test_an_emptied_file_is_refused_and_what_it_said_holds_on(tmp_path: Path) -> None:
    async with running(tmp_path, ROUTE) as core:
        for text in ("", " \n\n"):
            (tmp_path / "moltbot.yaml").write_text(text)
            with pytest.raises(InvalidConfiguration, match=r"moltbot\.yaml is empty, .* holds on"):
                await core.reloading.reload()
        assert [route.id for route in core.reloading.routes] == ["default"]


async def test_a_file_that_is_gone_is_refused_and_what_it_said_holds_on(tmp_path: Path) -> None:
    async with running(tmp_path, ROUTE) as core:
        (tmp_path / "moltbot.yaml").unlink()
        with pytest.raises(InvalidConfiguration, match="is gone"):
            await core.reloading.reload()
        assert [route.id for route in core.reloading.routes] == ["default"]


async def test_a_file_of_comments_asks_for_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, ROUTE) as core:
        (tmp_path / "moltbot.yaml").write_text("# nothing for now\n")
        assert await core.reloading.reload() == []
        assert not core.reloading.routes


async def test_a_file_that_never_said_anything_may_be_empty_or_missing(tmp_path: Path) -> None:
    async with running(tmp_path, "", {"MOLTBOT_SYSTEM_PROMPT": "Be brief."}) as core:
        assert await core.reloading.reload() == []
        (tmp_path / "moltbot.yaml").unlink()
        assert await core.reloading.reload() == []


async def test_what_holds_from_the_next_start_is_told_by_key_even_where_a_flag_hides_it(tmp_path: Path) -> None:
    async with running(tmp_path, f"{ROUTE}grpc_port: 50051\n") as core:
        (tmp_path / "moltbot.yaml").write_text(
            "models: {primary: scripted, cooldown: 2s}\ncurrency: EUR\n"
            "grpc_port: 50060\nmetrics_port: 9464\ncache: {ttl: 60}\noutbox: {lease: 20s}\n"
        )
        told = await core.reloading.reload()
    # 9464 is what holds without a word as well.
    assert told == ["cache.ttl", "grpc_port", "outbox.lease"]


def test_every_setting_is_told_by_a_key() -> None:
    settings = replace(Settings(workspace=Path()), autoscaling=Autoscaling())
    named = {key.partition(".")[0] for key in KEYS}
    assert named == {item.name for item in fields(Settings)} - {"workspace", "origins", "beneath"}
    for key in KEYS:
        section, _, name = key.partition(".")
        if section not in LIVE and name:
            held = getattr(settings, section)
            assert is_dataclass(held)
            assert hasattr(held, name), key
