"""The library of a workspace: what it knows survives crashes and writers, and it deletes nothing but its own."""

from __future__ import annotations

import json
import multiprocessing
import stat
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from moltbot_server.config import load_settings
from moltbot_server.demo_model import ARTIFACT
from moltbot_server.errors import InvalidField, ModelExists, ModelInUse, ModelNotFound, ModelUnavailable
from moltbot_server.models.building import configured_catalog
from moltbot_server.models.folder import BUILTIN_ID
from moltbot_server.models.library import (
    BUILT_IN,
    KnownModel,
    Library,
    Origin,
    check_name,
    default_folder,
    default_model,
    name_of,
    overruled_by,
)
from moltbot_server.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A workspace."""
    workspace = Workspace(folder=tmp_path / "workspace")
    workspace.create()
    return workspace


@pytest.fixture
def library(workspace: Workspace) -> Library:
    """Its library, with nothing in it but the built-in model."""
    return Library(workspace)


@pytest.fixture
def mine(library: Library, tmp_path: Path) -> KnownModel:
    """A model of somebody's own folder, which holds what the built-in one does."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for file in ARTIFACT.iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file)
    model = KnownModel(name="mine", origin=Origin.ADDED, path=str(folder))
    library.add(model)
    return model


def pulled(library: Library, name: str = "tiny") -> KnownModel:
    """Let the library have a model of its own."""
    fresh = library.folder / f".{name}.partial"
    fresh.mkdir(parents=True)
    (fresh / "model.bin").write_bytes(b"weights")
    model = KnownModel(name=name, origin=Origin.PULLED, source="acme/tiny@4f5a")
    library.add(model, folder=fresh)
    return model


def test_a_new_library_knows_the_built_in_model(library: Library) -> None:
    assert library.models == (BUILT_IN,)
    assert library.find("builtin") == library.find(BUILTIN_ID) == BUILT_IN
    assert library.open(BUILT_IN).id == BUILTIN_ID
    assert library.default == ""


def test_what_is_added_is_found_again_by_name_and_in_order(workspace: Workspace, library: Library) -> None:
    for name in ("zoe", "anna"):
        library.add(KnownModel(name=name, origin=Origin.ADDED, path=f"/models/{name}", type="llama2"))
    again = Library(workspace)
    assert [model.name for model in again.models] == [BUILTIN_ID, "anna", "zoe"]
    assert again.find("zoe") == KnownModel(name="zoe", origin=Origin.ADDED, path="/models/zoe", type="llama2")
    assert again.knows("zoe")
    assert not again.knows("carl")
    with pytest.raises(ModelNotFound, match="known are moltbot-demo, anna, zoe"):
        again.find("carl")


def test_a_folder_is_opened_under_the_name_that_the_library_gives_it(library: Library, mine: KnownModel) -> None:
    assert library.open(mine).id == "mine"


def test_a_name_is_given_once(library: Library, mine: KnownModel) -> None:
    other = KnownModel(name="mine", origin=Origin.ADDED, path="/elsewhere")
    with pytest.raises(ModelExists):
        library.add(other)
    assert library.find("mine") == mine
    library.add(other, replace=True)
    assert library.find("mine") == other


@pytest.mark.parametrize(
    "name",
    ["", "-a", ".a", "A", "a/b", "a b", "..", "a" * 64, "模型", "builtin", "scripted", "local", "default", BUILTIN_ID],
)
def test_names_that_could_be_mistaken_or_leave_the_folder_are_refused(library: Library, name: str) -> None:
    with pytest.raises(InvalidField):
        library.add(KnownModel(name=name, origin=Origin.PULLED))
    assert library.models == (BUILT_IN,)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Qwen2.5-0.5B-Instruct", "qwen2.5-0.5b-instruct"),
        ("模型", "model"),
        ("a b", "a-b"),
        ("__x__", "x"),
        ("x" * 99, "x" * 63),
    ],
)
def test_a_folders_name_suggests_one_that_is_allowed(text: str, name: str) -> None:
    assert name_of(text) == name
    check_name(name)


def test_a_pulled_model_moves_into_its_place_and_with_the_workspace(library: Library, tmp_path: Path) -> None:
    model = pulled(library)
    assert (library.folder / "tiny" / "model.bin").read_bytes() == b"weights"
    assert not (library.folder / ".tiny.partial").exists()
    (tmp_path / "workspace").rename(tmp_path / "elsewhere")
    moved = Library(Workspace(folder=tmp_path / "elsewhere"))
    assert moved.path(moved.find("tiny")) == tmp_path / "elsewhere" / "models" / "tiny"
    assert moved.find("tiny") == model


def test_what_lies_where_a_model_would_go_is_not_replaced(library: Library) -> None:
    (library.folder / "tiny").mkdir(parents=True)
    (library.folder / "tiny" / "precious").write_text("mine")
    with pytest.raises(ModelExists, match="there already"):
        pulled(library)
    assert (library.folder / "tiny" / "precious").read_text() == "mine"
    assert (library.folder / ".tiny.partial" / "model.bin").exists()
    assert not library.knows("tiny")


def test_removing_deletes_what_was_pulled(library: Library) -> None:
    pulled(library)
    pulled(library, "other")
    library.remove("tiny")
    assert not library.knows("tiny")
    assert sorted(path.name for path in library.folder.iterdir()) == ["other"]


def test_removing_never_deletes_somebodys_own_folder(library: Library, mine: KnownModel) -> None:
    library.remove("mine")
    assert not library.knows("mine")
    assert (Path(mine.path) / "model.bin").exists()


def test_removing_never_deletes_somebodys_own_folder_although_it_lies_where_pulled_ones_do(library: Library) -> None:
    (library.folder / "own").mkdir(parents=True)
    library.add(KnownModel(name="own", origin=Origin.ADDED, path=str(library.folder / "own")))
    library.remove("own")
    assert (library.folder / "own").is_dir()


def test_removing_does_not_follow_a_link_out_of_the_workspace(library: Library, tmp_path: Path) -> None:
    pulled(library)
    (library.folder / "tiny").rename(tmp_path / "kept")
    (library.folder / "tiny").symlink_to(tmp_path / "kept")
    library.remove("tiny")
    assert (tmp_path / "kept" / "model.bin").exists()


def test_a_pulled_model_whose_folder_is_gone_can_be_removed(library: Library) -> None:
    pulled(library)
    (library.folder / "tiny" / "model.bin").unlink()
    (library.folder / "tiny").rmdir()
    library.remove("tiny")
    assert not library.knows("tiny")


def test_the_built_in_and_the_chosen_model_are_not_removed(library: Library, mine: KnownModel) -> None:
    with pytest.raises(ModelInUse, match="part of MoltBot"):
        library.remove("builtin")
    library.choose("mine")
    with pytest.raises(ModelInUse, match="choose another"):
        library.remove("mine")
    with pytest.raises(ModelNotFound):
        library.remove("nobody")
    assert library.knows("mine")


def test_the_file_is_private_and_a_person_can_read_it(workspace: Workspace, library: Library, mine: KnownModel) -> None:
    library.choose("mine")
    file = workspace.folder / "models.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text())["default"] == "mine"
    assert len(file.read_text().splitlines()) > 5


@pytest.mark.parametrize("content", ["{", "[]", '{"models": [{"name": 7}]}', "x" * (2 << 20)])
def test_a_library_that_cannot_be_read_says_what_to_do_and_is_not_overwritten(
    workspace: Workspace, library: Library, content: str
) -> None:
    file = workspace.folder / "models.json"
    file.write_text(content)
    for attempt in (lambda: library.models, lambda: library.choose("builtin"), lambda: library.remove("tiny")):
        with pytest.raises(ModelUnavailable, match=r"models\.json cannot be read.*delete it"):
            attempt()
    with pytest.raises(ModelUnavailable):
        library.add(KnownModel(name="tiny", origin=Origin.ADDED, path="/x"))
    assert file.read_text() == content


def test_a_newer_library_with_more_in_it_can_be_read(workspace: Workspace, library: Library) -> None:
    model = {"name": "tiny", "origin": "added", "path": "/x", "colour": "blue"}
    (workspace.folder / "models.json").write_text(json.dumps({"version": 1, "models": [model], "more": 1}))
    assert library.find("tiny").path == "/x"


def add_many(folder: Path, prefix: str, together: Barrier) -> None:
    library = Library(Workspace(folder=folder))
    together.wait(60)
    for number in range(30):
        library.add(KnownModel(name=f"{prefix}{number}", origin=Origin.ADDED, path="/x"))


def test_writers_in_several_processes_lose_nothing(workspace: Workspace, library: Library) -> None:
    start = multiprocessing.get_context("spawn")
    together = start.Barrier(3)
    writers = [start.Process(target=add_many, args=(workspace.folder, prefix, together)) for prefix in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert len(library.models) == 1 + 3 * 30


class TestTheChoice:
    """Who answers from the start on."""

    def test_nothing_chosen_leaves_it_to_the_configuration(self, workspace: Workspace) -> None:
        assert default_folder(load_settings(workspace.folder, {})) is None

    def test_the_chosen_model_answers(self, workspace: Workspace, library: Library, mine: KnownModel) -> None:
        library.choose("mine")
        folder = default_folder(load_settings(workspace.folder, {}))
        assert folder is not None
        assert (folder.id, folder.path) == ("mine", Path(mine.path))
        assert default_model(load_settings(workspace.folder, {})) == mine
        library.choose("")
        assert default_folder(load_settings(workspace.folder, {})) is None

    def test_a_choice_goes_before_the_configuration_file(
        self, workspace: Workspace, library: Library, mine: KnownModel
    ) -> None:
        workspace.config_file.write_text(f"model_path: {ARTIFACT}\n")
        library.choose("mine")
        settings = load_settings(workspace.folder, {})
        assert overruled_by(settings) == ""
        assert (folder := default_folder(settings)) is not None
        assert folder.id == "mine"

    @pytest.mark.parametrize("name", ["MODEL_PATH", "MOLTBOT_MODEL_PATH", "MODEL_TYPE"])
    def test_the_environment_goes_before_a_choice_and_is_named(
        self, workspace: Workspace, library: Library, mine: KnownModel, name: str
    ) -> None:
        library.choose("mine")
        settings = load_settings(workspace.folder, {name: "builtin" if name == "MODEL_TYPE" else str(ARTIFACT)})
        assert overruled_by(settings) == f"environment variable {name}"
        assert default_folder(settings) is None

    def test_an_environment_file_goes_before_a_choice_and_is_named(
        self, workspace: Workspace, library: Library, mine: KnownModel
    ) -> None:
        library.choose("mine")
        (workspace.folder / ".env").write_text(f"PORT=8000\nMODEL_PATH={ARTIFACT}\n")
        settings = load_settings(workspace.folder, {})
        assert overruled_by(settings) == f"{workspace.folder / '.env'}:2"
        assert default_folder(settings) is None

    def test_a_chosen_model_that_is_gone_stops_the_start_and_says_what_to_do(
        self, workspace: Workspace, library: Library
    ) -> None:
        library.add(KnownModel(name="gone", origin=Origin.ADDED, path="/nowhere"))
        library.choose("gone")
        with pytest.raises(ModelUnavailable, match=r"chosen model gone .* found nothing.*moltbot model switch"):
            default_folder(load_settings(workspace.folder, {}))

    async def test_a_chosen_model_whose_weights_are_not_whole_stops_the_start_and_says_what_to_do(
        self, workspace: Workspace, library: Library, mine: KnownModel
    ) -> None:
        library.choose(mine.name)
        weights = Path(mine.path) / "model.bin"
        whole = weights.read_bytes()
        weights.unlink()
        weights.write_bytes(whole[: len(whole) // 2])
        catalog = configured_catalog(load_settings(workspace.folder, {}))
        with pytest.raises(
            ModelUnavailable, match=r"chosen model mine .* cannot be loaded.*`moltbot model switch NAME`"
        ):
            await catalog.start()
