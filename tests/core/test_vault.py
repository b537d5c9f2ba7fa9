"""The vault: what it keeps, who can open it, what it says when it cannot be opened, and that nothing breaks halfway."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import resource
import signal
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from moltbot_server.auth import vault as vault_module
from moltbot_server.auth import vault_master
from moltbot_server.auth.vault import StoredKey, Vault, VaultError
from moltbot_server.auth.vault_master import MasterKey, parse_master
from moltbot_server.workspace import Workspace, make_key

SECRET = "sk-test-0123456789abcdefWXYZ"
OTHER = "sk-other-0123456789abcdefQRST"
NEW_MASTER = base64.b64encode(bytes(range(32))).decode()


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A workspace folder."""
    return Workspace(folder=tmp_path)


def opened(workspace: Workspace, environ: Mapping[str, str] | None = None) -> Vault:
    """Return the vault of a workspace as another process would find it."""
    vault = Vault(workspace, environ or {})
    vault.reload()
    return vault


def texts(workspace: Workspace, environ: Mapping[str, str] | None = None) -> list[str]:
    """Return what a fresh process finds."""
    return [key.text for key in opened(workspace, environ).keys]


def rewrite(workspace: Workspace, change: Callable[[Any], None]) -> None:
    """Change the file by another hand."""
    document = json.loads(workspace.vault_file.read_text())
    change(document)
    workspace.vault_file.write_text(json.dumps(document))


def test_a_key_that_was_kept_is_found_by_another_process(workspace: Workspace) -> None:
    assert texts(workspace) == []
    kept = Vault(workspace, {}).add("openai", SECRET, label="team")
    assert opened(workspace).keys == (kept,)
    assert (kept.provider, kept.label, kept.tail, kept.text) == ("openai", "team", "WXYZ", SECRET)


def test_neither_file_holds_a_secret_and_both_are_private(workspace: Workspace) -> None:
    Vault(workspace, {}).add("openai", SECRET)
    content = workspace.vault_file.read_bytes()
    assert SECRET.encode() not in content
    assert base64.b64encode(SECRET.encode())[:16] not in content
    assert workspace.vault_key_file.read_bytes().strip() not in content
    modes = {stat.S_IMODE(path.stat().st_mode) for path in workspace.folder.iterdir()}
    assert modes == {0o600}


def test_the_file_is_aes_256_gcm_with_what_it_says_of_each_key_as_associated_data(workspace: Workspace) -> None:
    kept = Vault(workspace, {}).add("openai", SECRET, label="team")
    document = json.loads(workspace.vault_file.read_text())
    master = parse_master(workspace.vault_key_file.read_text(), "").secret

    def unseal(key: bytes, sealed: dict[str, str], *place: object) -> bytes:
        nonce, ciphertext = (base64.b64decode(sealed[name]) for name in ("nonce", "ciphertext"))
        return AESGCM(key).decrypt(nonce, ciphertext, json.dumps(place, separators=(",", ":")).encode())

    data_key = unseal(master, document["data_key"], "moltbot vault", "data key", 1, document["master"])
    assert (len(master), len(data_key)) == (32, 32)
    found = unseal(
        data_key, document["entries"][0]["key"], "moltbot vault", "key", kept.id, "openai", "team", kept.created
    )
    assert found.decode() == SECRET


def test_every_writing_has_nonces_and_a_data_key_of_its_own(workspace: Workspace) -> None:
    vault, seen = Vault(workspace, {}), set()
    for number in range(5):
        vault.add("openai", f"{SECRET}{number}")
        document = json.loads(workspace.vault_file.read_text())
        seen |= {document["data_key"]["nonce"], *(entry["key"]["nonce"] for entry in document["entries"])}
    assert len(seen) == 5 + 1 + 2 + 3 + 4 + 5


def test_a_key_can_be_removed_and_an_unknown_one_cannot(workspace: Workspace) -> None:
    vault = Vault(workspace, {})
    first, second = vault.add("openai", SECRET), vault.add("anthropic", SECRET)
    assert vault.remove(first.id) == first
    assert opened(workspace).keys == (second,)
    with pytest.raises(VaultError, match="no key of this id"):
        vault.remove(first.id)


def test_a_workspace_without_a_vault_has_no_key_to_remove(workspace: Workspace) -> None:
    with pytest.raises(VaultError, match="no key of this id"):
        Vault(workspace, {}).remove("x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "this is no key"),
        ("short", "this is no key"),
        ("sk-with blank-0123456789", "this is no key"),
        ("sk-with\nline-0123456789", "this is no key"),
        ("sk-schlüssel-0123456789", "this is no key"),
        ("x" * 5000, "this is no key"),
        pytest.param(make_key().text, "a key of MoltBot itself", id="a key of MoltBot itself"),
    ],
)
def test_what_is_no_key_is_refused_and_not_repeated(workspace: Workspace, text: str, said: str) -> None:
    with pytest.raises(VaultError, match=said) as caught:
        Vault(workspace, {}).add("openai", text)
    assert not text or text not in str(caught.value)
    assert not workspace.vault_file.exists()


def test_a_key_that_is_there_already_is_told_by_its_id(workspace: Workspace) -> None:
    vault = Vault(workspace, {})
    kept = vault.add("openai", SECRET)
    with pytest.raises(VaultError, match=f"openai has this key already, as {kept.id}"):
        vault.add("openai", SECRET)
    vault.add("office", SECRET)  # another provider may have the same


def test_of_a_short_key_nothing_is_shown(workspace: Workspace) -> None:
    assert Vault(workspace, {}).add("local", "12345678").tail == ""


def test_reload_reads_only_what_has_changed_and_keeps_what_it_has_when_that_fails(workspace: Workspace) -> None:
    reader, writer = Vault(workspace, {}), Vault(workspace, {})
    assert reader.reload() is False
    kept = writer.add("openai", SECRET)
    assert (reader.reload(), reader.reload(), reader.keys) == (True, False, (kept,))
    whole = workspace.vault_file.read_bytes()
    workspace.vault_file.write_bytes(whole[:-20])
    for _ in range(2):  # it is tried again, not taken for read
        with pytest.raises(VaultError, match="is damaged"):
            reader.reload()
    assert reader.keys == (kept,)
    workspace.vault_file.unlink()
    assert (reader.reload(), reader.keys) == (True, ())


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document["entries"][0].update(provider="elsewhere"),
        lambda document: document["entries"][0].update(label="other"),
        lambda document: document["entries"][0].update(id="0000000a"),
        lambda document: document["entries"][0].update(created=1),
        lambda document: document["entries"][0].update(key=document["entries"][1]["key"]),
        lambda document: document["entries"][0]["key"].update(nonce=""),
        lambda document: document["entries"][0]["key"].update(ciphertext=base64.b64encode(b"x" * 40).decode()),
        lambda document: document["data_key"].update(document["entries"][0]["key"]),
    ],
)
def test_an_entry_that_was_changed_or_moved_does_not_open(workspace: Workspace, change: Callable[[Any], None]) -> None:
    vault = Vault(workspace, {})
    vault.add("openai", SECRET)
    vault.add("anthropic", OTHER)
    rewrite(workspace, change)
    with pytest.raises(VaultError, match=r"was changed by another hand: .* Put a copy back, or delete") as caught:
        opened(workspace)
    assert SECRET not in str(caught.value)
    with pytest.raises(VaultError, match="was changed by another hand"):
        vault.add("qwen", OTHER)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is damaged"),
        (b"[]", "is damaged"),
        (b'{"version": 1}', "is damaged"),
        (b'{"version": 2, "keys": []}', "is of version 2 and this MoltBot reads version 1"),
        (b"\xff\xfe", "is damaged"),
    ],
)
def test_a_file_that_is_no_vault_is_told_with_the_next_step(workspace: Workspace, content: bytes, said: str) -> None:
    Vault(workspace, {}).add("openai", SECRET)
    workspace.vault_file.write_bytes(content)
    with pytest.raises(VaultError, match=said):
        opened(workspace)


@pytest.mark.parametrize("name", ["vault.json", "vault.key"])
def test_a_file_that_others_can_read_is_refused_with_the_next_step(workspace: Workspace, name: str) -> None:
    Vault(workspace, {}).add("openai", SECRET)
    (workspace.folder / name).chmod(0o640)
    with pytest.raises(VaultError, match=rf"{name} can be read by other users .* run `chmod 600 "):
        opened(workspace)


def test_a_vault_that_was_opened_to_others_meanwhile_is_refused_when_it_is_read_again(workspace: Workspace) -> None:
    vault = Vault(workspace, {})
    vault.add("openai", SECRET)
    workspace.vault_file.chmod(0o644)
    with pytest.raises(VaultError, match="can be read by other users"):
        vault.reload()
    assert [key.text for key in vault.keys] == [SECRET]


@pytest.mark.parametrize("name", ["vault.json", "vault.key"])
def test_a_link_a_folder_or_a_pipe_in_the_place_of_a_file_is_refused(workspace: Workspace, name: str) -> None:
    Vault(workspace, {}).add("openai", SECRET)
    path = workspace.folder / name
    path.rename(workspace.folder / "moved")
    path.symlink_to(workspace.folder / "moved")
    with pytest.raises(VaultError, match=f"{name} cannot be read"):
        opened(workspace)
    path.unlink()
    path.mkdir(mode=0o700)
    with pytest.raises(VaultError, match=f"{name} cannot be read"):
        opened(workspace)
    path.rmdir()
    os.mkfifo(path, mode=0o600)
    with pytest.raises(VaultError, match=f"{name} is no file"):
        opened(workspace)


class TestMasterKey:
    """Where the master key is, and what is said when it is not."""

    def test_a_missing_one_is_told_with_what_is_lost(self, workspace: Workspace) -> None:
        Vault(workspace, {}).add("openai", SECRET)
        workspace.vault_key_file.unlink()
        with pytest.raises(VaultError, match=r"master key is missing: there is no .*vault\.key"):
            opened(workspace)
        with pytest.raises(VaultError, match="master key is missing"):
            Vault(workspace, {}).add("openai", OTHER)
        assert not workspace.vault_key_file.exists()

    def test_another_one_is_told_from_a_changed_vault(self, workspace: Workspace) -> None:
        Vault(workspace, {}).add("openai", SECRET)
        with pytest.raises(VaultError, match="the variable MOLTBOT_VAULT_KEY holds another master key than"):
            opened(workspace, {"MOLTBOT_VAULT_KEY": NEW_MASTER})

    @pytest.mark.parametrize("form", ["base64", "urlsafe", "hex"])
    def test_it_can_live_in_a_variable_alone(self, workspace: Workspace, form: str) -> None:
        secret = b"\xfb\xff" * 16
        encode = {
            "base64": base64.b64encode,
            "urlsafe": base64.urlsafe_b64encode,
            "hex": lambda key: key.hex().encode(),
        }
        environ = {"MOLTBOT_VAULT_KEY": encode[form](secret).decode()}
        Vault(workspace, environ).add("openai", SECRET)
        assert texts(workspace, environ) == [SECRET]
        assert not workspace.vault_key_file.exists()

    def test_it_can_live_in_a_file_elsewhere_through_links_as_secrets_are_mounted(self, workspace: Workspace) -> None:
        mounted = workspace.folder / "mounted"
        mounted.mkdir()
        (mounted / "data").write_text(f"{NEW_MASTER}\n")
        (mounted / "data").chmod(0o400)
        (mounted / "master").symlink_to("data")
        environ = {"MOLTBOT_VAULT_KEY_FILE": str(mounted / "master")}
        Vault(workspace, environ).add("openai", SECRET)
        assert texts(workspace, environ) == [SECRET]
        assert texts(workspace, {"MOLTBOT_VAULT_KEY": NEW_MASTER}) == [SECRET]

    @pytest.mark.parametrize(
        ("environ", "said"),
        [
            (
                {"MOLTBOT_VAULT_KEY": "PLANTED"},
                "variable MOLTBOT_VAULT_KEY holds no master key: expected 32 random",
            ),
            ({"MOLTBOT_VAULT_KEY": "AAAA"}, "holds no master key"),
            ({"MOLTBOT_VAULT_KEY_FILE": "/nowhere/PLANTED-not"}, "and there is no such file; it needs 32 random bytes"),
            ({"MOLTBOT_VAULT_KEY": NEW_MASTER, "MOLTBOT_VAULT_KEY_FILE": "/x"}, "are both set; keep one"),
        ],
    )
    def test_a_place_without_a_key_is_told_and_no_vault_begins(
        self, workspace: Workspace, environ: dict[str, str], said: str
    ) -> None:
        with pytest.raises(VaultError, match=said) as caught:
            Vault(workspace, environ).add("openai", SECRET)
        assert "PLANTED " not in str(caught.value)
        assert not workspace.vault_file.exists()

    def test_its_text_and_what_holds_it_show_nothing(self, workspace: Workspace) -> None:
        key = MasterKey(secret=bytes(range(32)))
        assert key.text not in repr(key)
        assert "\\x01" not in repr(key)
        vault = Vault(workspace, {"MOLTBOT_VAULT_KEY": NEW_MASTER})
        vault.add("openai", SECRET)
        assert NEW_MASTER not in repr(vault) + repr(vars(vault))
        assert SECRET not in repr(vault) + repr(vars(vault)) + repr(vault.keys) + str(vault.keys[0])


class TestRotation:
    """A new master key, wherever the old one was, and whatever happens meanwhile."""

    def test_everything_is_encrypted_anew_and_opens_with_the_new_one_alone(self, workspace: Workspace) -> None:
        vault = Vault(workspace, {})
        kept = (vault.add("openai", SECRET), vault.add("anthropic", OTHER))
        old_key, old_file = workspace.vault_key_file.read_bytes(), workspace.vault_file.read_bytes()
        vault.rotate_master()
        assert opened(workspace).keys == kept
        assert workspace.vault_key_file.read_bytes() != old_key
        assert json.loads(workspace.vault_file.read_bytes())["entries"] != json.loads(old_file)["entries"]
        workspace.vault_key_file.write_bytes(old_key)
        with pytest.raises(VaultError, match="holds another master key"):
            opened(workspace)
        assert sorted(path.name for path in workspace.folder.iterdir()) == ["vault.json", "vault.key", "vault.lock"]

    def test_without_a_vault_there_is_nothing_to_rotate(self, workspace: Workspace) -> None:
        with pytest.raises(VaultError, match="there is no vault yet; `moltbot key add PROVIDER` makes one"):
            Vault(workspace, {}).rotate_master()

    def test_from_a_variable_the_new_one_is_told_by_another(self, workspace: Workspace) -> None:
        environ = {"MOLTBOT_VAULT_KEY": base64.b64encode(b"o" * 32).decode()}
        Vault(workspace, environ).add("openai", SECRET)
        with pytest.raises(VaultError, match="tell the new key with MOLTBOT_VAULT_KEY_NEW"):
            Vault(workspace, environ).rotate_master()
        assert texts(workspace, environ) == [SECRET]
        Vault(workspace, {**environ, "MOLTBOT_VAULT_KEY_NEW": NEW_MASTER}).rotate_master()
        assert texts(workspace, {"MOLTBOT_VAULT_KEY": NEW_MASTER}) == [SECRET]

    def test_a_file_elsewhere_is_replaced_there_and_its_link_stays(self, workspace: Workspace) -> None:
        (workspace.folder / "elsewhere").mkdir()
        real, link = workspace.folder / "elsewhere" / "real", workspace.folder / "link"
        real.write_text(NEW_MASTER)
        real.chmod(0o600)
        link.symlink_to(real)
        environ = {"MOLTBOT_VAULT_KEY_FILE": str(link)}
        Vault(workspace, environ).add("openai", SECRET)
        Vault(workspace, environ).rotate_master()
        assert real.read_text().strip() != NEW_MASTER
        assert link.is_symlink()
        assert texts(workspace, environ) == [SECRET]

    @pytest.mark.parametrize("step", ["prepare", "write", "take"])
    def test_broken_off_anywhere_the_vault_opens_and_can_be_rotated_again(
        self, workspace: Workspace, step: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vault = Vault(workspace, {})
        kept = (vault.add("openai", SECRET),)

        def die(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as broken:
            if step == "prepare":
                broken.setattr(vault_master, "write_private", die)
            elif step == "write":
                broken.setattr(vault_module, "write_private", die)
            else:
                broken.setattr(vault_master.Master, "take", lambda self, used: die() if self._next.exists() else None)
            with pytest.raises(KeyboardInterrupt):
                vault.rotate_master()
        assert opened(workspace).keys == kept
        before = workspace.vault_file.read_bytes()
        Vault(workspace, {}).rotate_master()
        assert opened(workspace).keys == kept
        assert workspace.vault_file.read_bytes() != before
        assert not (workspace.folder / "vault.key.next").exists()

    def test_a_key_added_after_a_rotation_was_broken_off_is_found(
        self, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vault = Vault(workspace, {})
        vault.add("openai", SECRET)
        with monkeypatch.context() as broken:
            broken.setattr(vault_master.Master, "take", lambda *_: None)
            vault.rotate_master()
        assert (workspace.folder / "vault.key.next").exists()
        Vault(workspace, {}).add("openai", OTHER)
        assert texts(workspace) == [SECRET, OTHER]
        assert not (workspace.folder / "vault.key.next").exists()


def _add_and_rotate(folder: Path, number: int) -> None:
    vault = Vault(Workspace(folder=folder), {})
    for each in range(5):
        vault.add("openai", f"sk-process-{number}-key-{each}-0123456789")
        if each % 2:
            vault.rotate_master()
        vault.reload()


def test_processes_that_change_the_vault_at_once_lose_nothing(workspace: Workspace) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(4) as pool:
        pool.starmap(_add_and_rotate, [(workspace.folder, number) for number in range(4)])
    wanted = {f"sk-process-{number}-key-{each}-0123456789" for number in range(4) for each in range(5)}
    assert set(texts(workspace)) == wanted


def _add_without_room(folder: Path) -> str:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
    try:
        Vault(Workspace(folder=folder), {}).add("openai", OTHER)
    except VaultError as problem:
        return str(problem)
    return ""


def test_a_vault_that_cannot_be_written_is_told_and_stays_as_it_was(workspace: Workspace) -> None:
    kept = Vault(workspace, {}).add("openai", SECRET)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        said = pool.apply(_add_without_room, (workspace.folder,))
    assert said == f"{workspace.vault_file} cannot be written: File too large."
    assert opened(workspace).keys == (kept,)
    assert len(list(workspace.folder.iterdir())) == 3


def test_a_stored_key_shows_all_but_its_secret() -> None:
    key = StoredKey(id="a", provider="openai", label="l", created=1, text=SECRET)
    assert SECRET not in f"{key!r} {key}"
    assert "openai" in repr(key)
