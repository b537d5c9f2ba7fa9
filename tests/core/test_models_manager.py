"""Models that are loaded, chosen and let go while turns run."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from moltbot_server.demo_model import ARTIFACT
from moltbot_server.errors import ModelExists, ModelInUse, ModelNotFound, ModelNotLoadable, ModelUnavailable
from moltbot_server.models import building
from moltbot_server.models.building import LocalLoader, Resources
from moltbot_server.models.catalog import Catalog, ModelState
from moltbot_server.models.engine import Chunk, Engine, stream
from moltbot_server.models.engines.scripted import Script, ScriptedEngine
from moltbot_server.models.manager import ModelManager, ModelSpec, Progress
from moltbot_server.models.memory import available_memory, check_room
from moltbot_server.turns import GenerationOptions, Message, Role, TextPart


@pytest.fixture
async def manager() -> ModelManager:
    """A manager whose one model is scripted; others are loaded into this process."""
    catalog = Catalog([ScriptedEngine()])
    await catalog.start()
    manager = ModelManager(catalog, LocalLoader(Resources(threads=1)))
    manager.catalog = catalog  # type: ignore[attr-defined]
    return manager


def catalog_of(manager: ModelManager) -> Catalog:
    return manager.catalog  # type: ignore[attr-defined, no-any-return]


async def said(engine: Engine, text: str) -> str:
    messages = (Message(role=Role.USER, parts=(TextPart(text=text),)),)
    chunks = [chunk async for chunk in stream(engine, messages, GenerationOptions())]
    return "".join(chunk.text for chunk in chunks if isinstance(chunk, Chunk))


async def test_a_model_is_loaded_beside_the_default_then_chosen_then_the_old_one_is_let_go(
    manager: ModelManager,
) -> None:
    steps: list[tuple[str, float]] = []
    entry = await manager.load_model("demo", ARTIFACT, progress=lambda stage, share: steps.append((stage, share)))
    before = catalog_of(manager).default
    chosen, previous = await manager.switch_model("demo")
    await manager.unload_model("scripted")
    answer = await said(catalog_of(manager).get(), "Who are you?")
    state = entry.state
    await catalog_of(manager).close()

    assert (before, previous, chosen) == ("scripted", "scripted", entry)
    assert [stage for stage, _ in steps] == ["reading", "loading", "ready"]
    assert [share for _, share in steps] == sorted(share for _, share in steps)
    assert (state, entry.engine.id) == (ModelState.READY, "demo")
    assert "MoltBot" in answer
    assert [each.engine.id for each in catalog_of(manager).entries] == ["demo"]


async def test_a_load_is_safe_to_repeat_and_a_name_stands_for_one_model(manager: ModelManager) -> None:
    first, second = await asyncio.gather(manager.load_model("demo", ARTIFACT), manager.load_model("demo", ARTIFACT))
    again = await manager.load_model("demo", str(ARTIFACT))
    with pytest.raises(ModelExists, match="demo"):
        await manager.load_model("demo", ARTIFACT, context_length=128)
    with pytest.raises(ModelExists, match="scripted"):
        await manager.load_model("scripted", ARTIFACT)
    await catalog_of(manager).close()

    assert first is second is again


async def test_what_fails_its_probe_leaves_nothing_behind_and_its_name_is_free(
    manager: ModelManager, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(ARTIFACT, broken)
    (broken / "model.bin").write_bytes(b"no weights")
    with pytest.raises(ModelNotLoadable, match="cannot be loaded"):
        await manager.load_model("next", broken)
    with pytest.raises(ModelNotLoadable, match="expected the folder"):
        await manager.load_model("next", tmp_path / "missing")
    with pytest.raises(ModelNotFound):
        await manager.switch_model("next")
    entry = await manager.load_model("next", ARTIFACT)
    await catalog_of(manager).close()

    assert catalog_of(manager).default == "scripted"
    assert entry.engine.id == "next"


async def test_a_model_that_memory_would_not_suffice_for_is_refused_before_it_is_loaded(
    manager: ModelManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "available_memory", lambda: 50 << 20)
    with pytest.raises(ModelNotLoadable, match=r"would take about \d+ MB of memory and 50 MB are available"):
        await manager.load_model("demo", ARTIFACT)

    assert [entry.engine.id for entry in catalog_of(manager).entries] == ["scripted"]


async def test_the_default_cannot_be_unloaded_and_turns_under_way_end_first(manager: ModelManager) -> None:
    with pytest.raises(ModelInUse, match="switch to another"):
        await manager.unload_model("scripted")
    entry = await manager.load_model("demo", ARTIFACT)
    engine = entry.hold()
    unloading = asyncio.create_task(manager.unload_model("demo"))
    await asyncio.sleep(0)  # once for the caller, once for the unloading itself
    await asyncio.sleep(0)
    assert entry.state is ModelState.DRAINING
    with pytest.raises(ModelUnavailable, match="ends its last turns"):
        catalog_of(manager).ready("demo")
    answer = await said(engine, "hello")
    assert not unloading.done()
    entry.release()
    await unloading

    assert answer
    assert not engine.healthy
    with pytest.raises(ModelNotFound):
        catalog_of(manager).entry("demo")


class StuckLoader:
    """Loads when it is told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def load(self, spec: ModelSpec, progress: Progress) -> Engine:
        progress("reading", 0.0)
        await self.go.wait()
        engine = ScriptedEngine(Script(id=spec.name))
        await engine.start()
        return engine

    async def prefer(self, engine: Engine) -> None: ...

    async def unload(self, engine: Engine) -> None:
        await engine.close()


async def test_a_load_goes_on_when_its_caller_leaves() -> None:
    catalog, loader = Catalog([ScriptedEngine()]), StuckLoader()
    await catalog.start()
    manager = ModelManager(catalog, loader)
    caller = asyncio.create_task(manager.load_model("next", "somewhere"))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    loader.go.set()

    assert (await manager.load_model("next", "somewhere")).state is ModelState.READY


def meminfo(root: Path, kilobytes: int) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {kilobytes} kB\n")


def test_the_room_left_is_that_of_the_tightest_group(tmp_path: Path) -> None:
    meminfo(tmp_path, 4 << 20)
    assert available_memory(tmp_path) == 4 << 30
    (tmp_path / "proc/self/cgroup").write_text("0::/outer/inner\n")
    for name, most, used in (("outer", str(3 << 30), 1 << 30), ("outer/inner", "max", 1 << 20)):
        (tmp_path / "sys/fs/cgroup" / name).mkdir(parents=True)
        (tmp_path / "sys/fs/cgroup" / name / "memory.max").write_text(most)
        (tmp_path / "sys/fs/cgroup" / name / "memory.current").write_text(str(used))
    assert available_memory(tmp_path) == 2 << 30


def test_the_first_version_of_control_groups_is_read_too(tmp_path: Path) -> None:
    meminfo(tmp_path, 4 << 20)
    (tmp_path / "proc/self/cgroup").write_text("7:cpu,cpuacct:/x\n5:memory:/docker/abc\n")
    base = tmp_path / "sys/fs/cgroup/memory"  # a container sees its own group at the root
    base.mkdir(parents=True)
    (base / "memory.limit_in_bytes").write_text(str(512 << 20))
    (base / "memory.usage_in_bytes").write_text(str(500 << 20))
    assert available_memory(tmp_path) == 12 << 20


def test_without_any_number_nothing_is_refused(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    check_room("big", 1 << 50, None)
    with pytest.raises(ModelNotLoadable):
        check_room("big", 1 << 50, 1 << 40)
