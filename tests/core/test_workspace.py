"""The workspace folder: private, safe to make twice, with a key that cannot be mistaken and links that work once."""

import errno
import hashlib
import multiprocessing
import os
import stat
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moltbot_server.cli.starting import _Site
from moltbot_server.workspace import LINK_LIFE, Workspace, WorkspaceError, find_workspace, make_key, parse_key


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A workspace that was made."""
    made = Workspace(folder=tmp_path / "bot")
    made.create()
    return made


def mode(path: Path) -> int:
    """Return a path's rights."""
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_workspace_is_private_and_holds_a_valid_key(workspace: Workspace) -> None:
    assert parse_key(workspace.read_key()) is not None
    assert mode(workspace.key_file) == 0o600
    folders = (workspace.folder, workspace.http_state, workspace.links, workspace.run)
    assert {mode(folder) for folder in folders} == {0o700}
    assert not [path for path in workspace.folder.rglob("*") if mode(path) & 0o077]


def test_making_it_again_changes_nothing(workspace: Workspace) -> None:
    key = workspace.read_key()
    workspace.config_file.write_text("port: 9000\n")
    assert workspace.create() == ()
    assert workspace.read_key() == key
    assert workspace.config_file.read_text() == "port: 9000\n"


def _create(folder: Path) -> str:
    workspace = Workspace(folder=folder)
    workspace.create()
    return workspace.read_key()


def test_processes_that_make_it_at_the_same_time_end_up_with_one_key(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        keys = set(pool.map(_create, [tmp_path / "bot"] * 16))
    assert len(keys) == 1
    assert not list((tmp_path / "bot").glob(".key*"))


def test_a_key_that_others_can_read_is_refused_until_it_is_made_private(workspace: Workspace) -> None:
    workspace.key_file.chmod(0o640)
    with pytest.raises(WorkspaceError, match="can be read by other users: run `moltbot init`"):
        workspace.read_key()
    assert "private" in " ".join(workspace.create())
    assert mode(workspace.key_file) == 0o600
    workspace.read_key()


def test_a_folder_that_others_can_open_is_made_private(workspace: Workspace) -> None:
    workspace.folder.chmod(0o755)
    workspace.links.chmod(0o777)
    assert len(workspace.create()) == 2
    assert mode(workspace.folder) == mode(workspace.links) == 0o700


def test_a_folder_that_was_there_before_keeps_its_mode_also_when_it_is_a_workspace(tmp_path: Path) -> None:
    found = Workspace(folder=tmp_path / "project")
    found.folder.mkdir(mode=0o755)
    for _ in range(2):
        assert "private:" not in " ".join(found.create())
        assert mode(found.folder) == 0o755
    assert not [path for path in found.folder.rglob("*") if mode(path) & 0o077]
    (found.folder / ".as-found").unlink()
    assert "private:" in " ".join(found.create())
    assert mode(found.folder) == 0o700


def test_a_restored_workspace_is_made_private_whatever_its_files_were(workspace: Workspace) -> None:
    workspace.database.touch()
    for path in (workspace.folder, workspace.http_state, workspace.links, workspace.run):
        path.chmod(0o755)
    workspace.key_file.chmod(0o644)
    workspace.create()
    assert mode(workspace.folder) == mode(workspace.run) == 0o700
    workspace.key_file.unlink()
    workspace.folder.chmod(0o755)
    workspace.create()
    assert mode(workspace.folder) == 0o700


@pytest.mark.parametrize("rights", [0o1777, 0o777, 0o775])
def test_a_folder_that_others_may_write_into_is_refused_as_it_is(tmp_path: Path, rights: int) -> None:
    found = Workspace(folder=tmp_path / "our things")
    found.folder.mkdir()
    found.folder.chmod(rights)
    with pytest.raises(WorkspaceError, match=r"others may write into .*our things, .* --workspace .*/moltbot") as told:
        found.create()
    assert ("chmod go-w '" in str(told.value)) == (rights != 0o1777)
    assert f"with --workspace '{found.folder}/moltbot'" in str(told.value), "a shell takes it as one word"
    assert stat.S_IMODE(found.folder.stat().st_mode) == rights
    assert list(found.folder.iterdir()) == []
    Workspace(folder=found.folder / "moltbot").create()


def test_a_folder_for_everybody_is_left_alone_also_when_there_is_a_key_in_it(workspace: Workspace) -> None:
    workspace.folder.chmod(0o1777)
    with pytest.raises(WorkspaceError, match="others may write into"):
        workspace.create()
    assert mode(workspace.folder) == 0o1777


def test_a_folder_with_a_folder_of_somebody_elses_use_is_refused_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "var" / "run").mkdir(parents=True)
    (tmp_path / "var" / "run").chmod(0o755)
    with pytest.raises(WorkspaceError, match="it has a folder run, which a workspace keeps private"):
        Workspace(folder=tmp_path / "var").create()
    assert mode(tmp_path / "var" / "run") == 0o755
    assert [path.name for path in (tmp_path / "var").iterdir()] == ["run"]


def test_a_key_that_is_missing_is_told_apart_from_a_workspace_that_is(workspace: Workspace, tmp_path: Path) -> None:
    workspace.key_file.unlink()
    with pytest.raises(WorkspaceError, match=r"the workspace .* is there and its key is missing") as missing:
        workspace.read_key()
    assert "moltbot init" in str(missing.value)
    assert "stop MoltBot" in str(missing.value)
    with pytest.raises(WorkspaceError, match="there is no workspace in"):
        Workspace(folder=tmp_path / "nowhere").read_key()


def test_a_new_key_beside_conversations_is_told_as_one_that_ends_the_one_before(workspace: Workspace) -> None:
    workspace.key_file.unlink()
    assert workspace.create() == (f"made a key in {workspace.key_file}, readable by you alone",)
    workspace.key_file.unlink()
    workspace.database.touch()
    assert workspace.create() == (
        f"made a new key in {workspace.key_file}, readable by you alone: there was a database, and no key. Who has the "
        "key of before is refused; to keep that one, put it back from a backup and start MoltBot again",
    )


def test_a_key_or_folder_that_is_a_link_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    workspace.key_file.rename(elsewhere)
    workspace.key_file.symlink_to(elsewhere)
    with pytest.raises(WorkspaceError):
        workspace.read_key()
    with pytest.raises(WorkspaceError, match="is a link"):
        workspace.create()


def test_a_damaged_key_is_told_from_a_missing_one(workspace: Workspace) -> None:
    key = workspace.read_key()
    workspace.key_file.write_text(key[:-1] + ("0" if key[-1] != "0" else "1"))
    with pytest.raises(WorkspaceError, match="does not hold a key"):
        workspace.read_key()
    workspace.key_file.unlink()
    with pytest.raises(WorkspaceError, match="its key is missing"):
        workspace.read_key()


def test_a_place_that_cannot_be_used_is_told_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WorkspaceError, match="Choose another folder with --workspace"):
        Workspace(folder=tmp_path / "file" / "bot").create()


def test_a_configuration_that_is_a_folder_is_told(workspace: Workspace) -> None:
    workspace.config_file.unlink()
    workspace.config_file.mkdir()
    with pytest.raises(WorkspaceError, match=r"moltbot\.yaml is a folder; move it away"):
        workspace.create()


def test_a_full_disk_is_told_with_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # and names no file, as a write does not

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(WorkspaceError, match=rf"No space left on device \({tmp_path / 'bot'}\)"):
        Workspace(folder=tmp_path / "bot").create()


def test_a_key_has_the_documented_form() -> None:
    key = make_key()
    prefix, environment, name, secret, check = key.text.split("_")
    assert (prefix, environment, name, len(name), len(secret), len(check)) == ("mb", "live", key.id, 8, 43, 6)
    assert parse_key(key.text) == key
    assert key.text not in repr(key)


def test_no_two_keys_are_alike() -> None:
    keys = [make_key() for _ in range(1000)]
    assert len({key.id for key in keys}) == len({key.text for key in keys}) == 1000


@given(place=st.integers(0, 66), letter=st.sampled_from("0aZ_-é\n \0"))
def test_a_key_with_one_wrong_character_is_no_key(place: int, letter: str) -> None:
    text = make_key().text
    wrong = text[:place] + letter + text[place + 1 :]
    assert (parse_key(wrong) is None) == (wrong != text)


@given(st.text(max_size=100))
def test_arbitrary_text_is_no_key(text: str) -> None:
    assert parse_key(text) is None


def test_a_key_matches_its_own_digest_only() -> None:
    one, other = make_key(), make_key()
    assert one.matches(one.digest)
    assert not one.matches(other.digest)
    assert not one.matches(b"")


def test_a_link_is_kept_as_a_digest_with_its_end_and_the_ended_ones_are_cleared(workspace: Workspace) -> None:
    first = workspace.mint_link(1000.0)
    second = workspace.mint_link(1001.0, life=60)
    kept = {path.name: path.read_text() for path in workspace.links.iterdir()}
    names = [hashlib.sha256(code.encode()).hexdigest() for code in (first, second)]
    assert kept == {names[0]: "1900", names[1]: "1061"}
    assert {mode(workspace.links / name) for name in names} == {0o600}
    workspace.mint_link(1061.0)
    assert sorted(path.name for path in workspace.links.iterdir() if path.name in names) == [names[0]]


def test_a_link_that_cannot_be_written_is_named_and_leaves_nothing(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        workspace.mint_link(1000.0)
    assert Path(caught.value.filename).parent == workspace.links
    assert list(workspace.links.iterdir()) == []
    # A start goes on without it.
    shown = _Site._web_chat(cast("_Site", SimpleNamespace(_workspace=workspace, http="127.0.0.1:8000")))
    assert shown[0] == "  Web chat    http://127.0.0.1:8000"
    assert "no link that opens it (No space left on device): make room, then type" in shown[1]


def test_what_a_crash_left_of_a_link_is_cleared_when_its_time_is_over(workspace: Workspace) -> None:
    draft = workspace.links / ".half.0123"
    draft.touch()
    os.utime(draft, (1000.0, 1000.0))
    workspace.mint_link(1000.0 + LINK_LIFE - 1)
    assert draft.exists()
    workspace.mint_link(1000.0 + LINK_LIFE)
    assert not draft.exists()


def test_the_workspace_is_the_one_given_then_named_then_here_then_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    assert find_workspace({}).folder == home / ".moltbot"
    (here / ".moltbot").mkdir()
    assert find_workspace({}).folder == here / ".moltbot"
    assert find_workspace({"MOLTBOT_WORKSPACE": "~/named"}).folder == home / "named"
    assert find_workspace({"MOLTBOT_WORKSPACE": "~/named"}, Path("given")).folder == here / "given"


def test_what_cores_told_each_other_is_taken_away_and_nothing_else(workspace: Workspace) -> None:
    workspace.create()
    workspace.forget_boards()
    workspace.board_file("rests").write_bytes(b"facts")
    workspace.board_file("somebodys").mkdir()
    workspace.forget_boards()
    assert [path.name for path in workspace.run.iterdir()] == ["somebodys.board"]
