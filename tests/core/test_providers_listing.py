"""What a provider lists of its models: how much they read is learned from it, where nobody else has said so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from moltbot_server.config_models import ProviderModel
from moltbot_server.models.caching.metadata import MetadataCache
from moltbot_server.models.providers import ProviderEngine
from moltbot_server.models.providers.listing import NotTold, lengths_in
from provider_kit import DONE, STOP, Ring, Wire, answered, provider, response, started, stream, word

UNKNOWN = 32_768


def listing(*models: Any) -> bytes:
    body = json.dumps({"object": "list", "data": models}).encode()
    return response(body, content_type="application/json")


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    async with Wire(stream(word("Hello"), STOP, DONE)).running() as running:
        yield running


@pytest.fixture
async def metadata() -> AsyncIterator[MetadataCache]:
    cache = MetadataCache(ttl=3600, max_bytes=1 << 20)
    yield cache
    await cache.close()


async def learned(engine: ProviderEngine, wire: Wire) -> int:
    """Ask for an answer, wait until the list was read, and return how much the model reads."""
    await answered(engine)
    async with asyncio.timeout(5):
        while engine._look is not None:
            await asyncio.wait([engine._look])
    return engine.capabilities.context_length


async def test_how_much_a_model_reads_is_learned_beside_its_first_turn(wire: Wire, metadata: MetadataCache) -> None:
    wire.listing = listing({"id": "other", "max_model_len": 1000}, {"id": "mock-model", "max_model_len": 40_960})
    async with started(provider(wire.address), metadata=metadata) as engine:
        assert (engine.capabilities.context_length, wire.looks) == (UNKNOWN, [])
        assert await learned(engine, wire) == 40_960
        assert await learned(engine, wire) == 40_960
    (look,) = wire.looks
    assert look.startswith(b"GET /v1/models HTTP/1.1\r\n")
    assert b"\r\nauthorization: Bearer a-good-key\r\n" in look
    assert metadata.entries == 1


async def test_models_of_one_provider_share_its_list(wire: Wire, metadata: MetadataCache) -> None:
    wire.listing = listing({"id": "a", "context_length": 5000}, {"id": "b", "context_window": 6000})
    found = []
    for name in ("a", "b"):
        async with started(provider(wire.address), model=ProviderModel(name=name), metadata=metadata) as engine:
            found.append(await learned(engine, wire))
    assert found == [5000, 6000]
    assert (len(wire.looks), metadata.counts.hits, metadata.counts.misses) == (1, 1, 1)


async def test_what_the_configuration_says_is_not_asked_for(wire: Wire, metadata: MetadataCache) -> None:
    model = ProviderModel(name="mock-model", context_length=8000)
    async with started(provider(wire.address), model=model, metadata=metadata) as engine:
        assert await learned(engine, wire) == 8000
    async with started(provider(wire.address)) as engine:
        assert await learned(engine, wire) == UNKNOWN
    assert wire.looks == []


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"no HTTP at all\r\n\r\n",
        response(b"<html>", content_type="text/html"),
        response(b'{"data": 3}', content_type="application/json"),
        response(b"[" * 100_000, content_type="application/json"),
        response(b" " * (9 << 20), content_type="application/json"),
        listing({"id": "mock-model"}),
        listing({"id": "mock-model", "context_length": True}),
        listing({"id": "mock-model", "context_length": -5}),
        listing({"id": "mock-model", "context_length": 1e300}),
        listing({"id": ["mock-model"], "context_length": 5000}),
    ],
)
async def test_a_list_that_tells_nothing_changes_nothing(wire: Wire, metadata: MetadataCache, said: bytes) -> None:
    wire.listing = said
    async with started(provider(wire.address), metadata=metadata) as engine:
        assert await learned(engine, wire) == UNKNOWN
        assert await learned(engine, wire) == UNKNOWN
    assert len(wire.looks) == 1, "it is not asked again with each turn"


async def test_an_engine_that_closes_waits_for_no_list(wire: Wire, metadata: MetadataCache) -> None:
    wire.listing = b""
    async with started(provider(wire.address), Ring("a-good-key"), metadata=metadata) as engine:
        await answered(engine)
        look = engine._look
    assert look is not None
    await asyncio.wait([look], timeout=5)
    assert look.cancelled()


def test_the_first_name_that_holds_a_number_counts() -> None:
    body = b'{"data": [{"id": "a", "max_model_len": null, "context_length": "4096", "max_context_length": 2048}, {}]}'
    assert lengths_in(body) == {"a": 2048}
    with pytest.raises(NotTold):
        lengths_in(b"\xff")
