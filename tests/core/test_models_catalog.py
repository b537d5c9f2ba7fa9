"""The catalog: which models there are, which answers, and what wrong configuration is told."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from moltbot_server.config import Settings
from moltbot_server.errors import ModelNotFound, ModelUnavailable
from moltbot_server.models.building import Resources, build_engine, configured_catalog
from moltbot_server.models.catalog import Catalog, ModelState
from moltbot_server.models.engines.local import LocalEngine
from moltbot_server.models.engines.scripted import Script, ScriptedEngine
from moltbot_server.models.folder import read_folder
from moltbot_server.models.library import KnownModel, Library, Origin
from moltbot_server.models.tuning import Tuning
from moltbot_server.workspace import Workspace
from tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def broken(tmp_path: Path) -> LocalEngine:
    folder = make_tiny_model(tmp_path / "broken")
    (folder / "model.bin").write_bytes(b"no weights")
    return LocalEngine(read_folder(folder, model_id="broken"), tuning=Tuning(replicas=1))


async def test_models_are_found_by_id_and_the_first_is_the_default(tiny: Path) -> None:
    local, scripted = LocalEngine(read_folder(tiny), tuning=Tuning(replicas=1)), ScriptedEngine()
    catalog = Catalog([local, scripted])
    with pytest.raises(ModelUnavailable, match="being loaded") as caught:
        catalog.get()
    assert caught.value.retry_after == 1.0
    await catalog.start()
    assert (catalog.default, catalog.get(), catalog.get("tiny"), catalog.get("scripted")) == (
        "tiny", local, local, scripted,
    )  # fmt: skip
    assert [(entry.engine.id, entry.state, entry.message) for entry in catalog.entries] == [
        ("tiny", ModelState.READY, ""),
        ("scripted", ModelState.READY, ""),
    ]
    assert catalog.entry("").load_time > 1e9
    with pytest.raises(ModelNotFound, match=r"There is no model 'gpt'; available: tiny, scripted\."):
        catalog.get("gpt")
    await catalog.close()
    with pytest.raises(ModelUnavailable, match="stopped working"):
        catalog.get()


async def test_all_who_wait_for_the_last_turn_of_a_model_hear_of_its_end() -> None:
    catalog = Catalog([ScriptedEngine()])
    await catalog.start()
    entry = catalog.entry("")
    entry.hold()
    waiting = [asyncio.create_task(entry.drain()) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    entry.release()
    await asyncio.wait_for(asyncio.gather(*waiting), 5)


async def test_a_model_that_fails_to_load_is_kept_as_failed(tmp_path: Path) -> None:
    catalog = Catalog([ScriptedEngine(), broken(tmp_path)])
    await catalog.start()
    assert catalog.entry("broken").state is ModelState.FAILED
    with pytest.raises(ModelUnavailable, match=r"The model broken cannot answer: .*cannot be loaded"):
        catalog.get("broken")
    assert catalog.get("scripted").healthy
    await catalog.close()


async def test_a_default_model_that_fails_to_load_is_an_error(tmp_path: Path) -> None:
    other = ScriptedEngine()
    with pytest.raises(ModelUnavailable, match="cannot be loaded"):
        await Catalog([broken(tmp_path), other]).start()
    assert not other.healthy


def test_ids_are_unique() -> None:
    with pytest.raises(ValueError, match="an id of its own"):
        Catalog([ScriptedEngine(), ScriptedEngine()])
    with pytest.raises(ModelNotFound, match="available: none"):
        Catalog().get()
    assert len(Catalog([ScriptedEngine(), ScriptedEngine(Script(id="other"))]).entries) == 2


async def test_a_folder_or_a_script_is_built_from_the_configuration(tiny: Path, tmp_path: Path) -> None:
    local = build_engine(model_path=str(tiny), context_length=128, resources=Resources(threads=2))
    assert (local.id, local.type, local.capabilities.context_length) == ("tiny", "tiny", 128)
    script = tmp_path / "script.yaml"
    script.write_text("id: mine")
    assert build_engine(model_type="Scripted", model_path=str(script)).id == "mine"
    assert build_engine(model_type="scripted").id == "scripted"


def test_the_chosen_model_goes_before_the_configured_one(tiny: Path, tmp_path: Path) -> None:
    place = Workspace(folder=tmp_path)
    place.create()
    settings = Settings(workspace=tmp_path, model_type="scripted", shares=(("loud", 3),))
    assert configured_catalog(settings).default == "scripted"
    library = Library(place)
    library.add(KnownModel(name="mine", path=str(tiny), origin=Origin.ADDED))
    library.choose("mine")
    chosen = configured_catalog(Settings(workspace=tmp_path))
    assert (chosen.default, chosen.entries[0].engine.type) == ("mine", "tiny")
    assert Resources.of(settings).shares == {"loud": 3}


@pytest.mark.parametrize(
    ("kind", "path", "context", "words"),
    [
        ("bultin", "", None, "MODEL_TYPE is 'bultin'; expected one of .* Did you mean builtin"),
        ("llama2", "", None, "MODEL_TYPE is llama2 and MODEL_PATH is empty; expected the model's folder"),
        ("builtin", "{tiny}", None, "leave MODEL_PATH empty for the built-in model"),
        ("llama2", "{tiny}", None, "says 'tiny'"),
        ("", "{tiny}", 257, "CONTEXT_LENGTH is 257; expected 16 to 256, which is what tiny can read"),
        ("", "{tiny}", 4, "CONTEXT_LENGTH is 4; expected 16 to 256"),
        ("scripted", "", 10_000, "CONTEXT_LENGTH is 10000; expected 16 to 8192"),
        ("", "{tiny}/none", None, "found nothing; expected the folder"),
    ],
)
def test_wrong_configuration_is_told_what_was_found_and_expected(
    tiny: Path, kind: str, path: str, context: int | None, words: str
) -> None:
    with pytest.raises(ModelUnavailable, match=words):
        build_engine(model_type=kind, model_path=path.format(tiny=tiny), context_length=context)


@pytest.mark.parametrize("name", ["builtin", "built-in", "moltbot-demo", "MoltBot-Demo"])
def test_every_name_of_the_built_in_model_that_the_settings_accept_finds_it(name: str) -> None:
    assert build_engine(model_type=name).id == "moltbot-demo"
