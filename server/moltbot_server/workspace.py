"""The workspace folder: the owner's key, the configuration, and the places where the processes keep their things.

A key reads `mb_live_{id}_{secret}_{check}`: an id of 8 characters that may be shown, a secret of 43 (256 bits), and a
CRC-32 of what stands before it, so that a slip or a scanner's guess is told apart from a key without any look-up.
All are base 62. The form follows GitHub's tokens, see
https://github.blog/2021-04-05-behind-githubs-new-authentication-token-formats/.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import shlex
import stat
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

LINK_LIFE = 15 * 60.0
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_KEY = re.compile(r"(mb_live_([0-9A-Za-z]{8})_[0-9A-Za-z]{43})_([0-9A-Za-z]{6})")

_TEMPLATE = """\
# MoltBot's configuration. Take the `#` off a line to change it; docs/configuration.md explains every key.
# The environment and the command line go before this file, and so does .env beside it.

# port: 8000            # web chat and HTTP API
# grpc_port: 50051      # the core
# metrics_port: 9464    # /health and /metrics of the core
# log_level: info       # debug, info, warning or error

# A CTranslate2 model of your own; without one the built-in model answers.
# model_type: llama2
# model_path: /path/to/model
# context_length: 2048

# Models of others. Their keys are never written here: `moltbot key add openai` keeps one, encrypted.
# providers:
#   openai: {}            # its address and its models are known, as those of anthropic, deepseek, qwen and more
#   office:               # a name of your own, for any server that speaks as OpenAI's does
#     base_url: https://llm.example.com/v1
#     models: [team-large]

# Who answers when a turn names no model, and who stands in when that one fails; `local` is the model of this machine.
# models:
#   primary: gpt-4o
#   fallback: [team-large, local]
#   threshold: {latency: 3s, error_rate: 5%}
"""

_AS_FOUND = """\
# This folder was here, and others could open it, before MoltBot made it a workspace: its mode is left as it was found.
# Take this file away, and the next start makes the folder private.
"""

_LONGEST_SOCKET = 100  # bytes: what every system takes for the path of a Unix socket


class WorkspaceError(Exception):
    """The workspace folder cannot be used; the text says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A well-formed key. `id` may be shown and logged; `text` is the secret whole."""

    id: str
    text: str = field(repr=False)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the whole key: enough to recognise it, not enough to use it."""
        return hashlib.sha256(self.text.encode("ascii")).digest()

    def matches(self, digest: bytes) -> bool:
        """Compare with the digest of a known key, in a time that tells nothing."""
        return hmac.compare_digest(self.digest, digest)


def make_key() -> Key:
    """Return a fresh random key."""
    name = "".join(secrets.choice(_DIGITS) for _ in range(8))
    body = f"mb_live_{name}_{_base62(secrets.randbits(256), 43)}"
    return Key(id=name, text=f"{body}_{_check(body)}")


def parse_key(text: str) -> Key | None:
    """Return the key that a text is, or None when its form or its check is wrong. Looks nothing up."""
    match = _KEY.fullmatch(text) if len(text) <= 80 and text.isascii() else None
    if match is None or _check(match[1]) != match[3]:
        return None
    return Key(id=match[2], text=text)


def _check(body: str) -> str:
    return _base62(zlib.crc32(body.encode("ascii")), 6)


def _base62(number: int, width: int) -> str:
    digits = []
    for _ in range(width):
        number, digit = divmod(number, 62)
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """A workspace folder and where everything in it lies."""

    folder: Path

    @property
    def key_file(self) -> Path:
        """The owner's key, readable by the owner alone."""
        return self.folder / "key"

    @property
    def config_file(self) -> Path:
        """The YAML configuration."""
        return self.folder / "moltbot.yaml"

    @property
    def database(self) -> Path:
        """The SQLite database of sessions, turns and messages."""
        return self.folder / "moltbot.db"

    @property
    def http_state(self) -> Path:
        """What the HTTP adapter keeps: sign-in links and the key of its cookies."""
        return self.folder / "http"

    @property
    def links(self) -> Path:
        """One-time sign-in links: a file each, named by the code's SHA-256, holding when it ends."""
        return self.http_state / "links"

    @property
    def tuning_file(self) -> Path:
        """What was measured of models on this machine."""
        return self.folder / "tuning.json"

    @property
    def run(self) -> Path:
        """What runs now: written by `moltbot start`, read by `moltbot status` and `moltbot chat`."""
        return self.folder / "run"

    @property
    def engine_socket(self) -> Path:
        """Where the engine of `moltbot start` listens: in the workspace, or, where that path is too long, in a folder
        of the system's for short-lived files.
        """
        return self._socket("engine.sock")

    def core_socket(self, worker: int) -> Path:
        """Where one of several cores listens for the others and for adapters, in the same place; they count from 1."""
        return self._socket(f"core-{worker}.sock")

    def board_file(self, name: str) -> Path:
        """Where the cores of a machine tell each other what they know of something, while any of them runs."""
        return self.run / f"{name}.board"

    def forget_boards(self) -> None:
        """Take away what cores have told each other that run no longer."""
        for file in self.run.glob("*.board"):
            with contextlib.suppress(OSError):  # what is no file of ours, such as a folder, stays
                file.unlink()

    def adapter_socket(self, name: str) -> Path:
        """Where one of the processes that serve HTTP, called by its name, says that it does not stand still."""
        return self._socket(f"{name}.sock")

    def _socket(self, name: str) -> Path:
        path = self.run / name
        if len(os.fsencode(path)) <= _LONGEST_SOCKET:
            return path
        digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"moltbot-{os.geteuid()}-{digest}.sock"

    @property
    def vault_file(self) -> Path:
        """The keys of providers, encrypted."""
        return self.folder / "vault.json"

    @property
    def vault_key_file(self) -> Path:
        """The master key that opens the vault, unless it is kept elsewhere."""
        return self.folder / "vault.key"

    @property
    def history_file(self) -> Path:
        """What was typed into `moltbot chat`."""
        return self.folder / "chat_history"

    def exists(self) -> bool:
        """Return True when the folder has been made a workspace."""
        return self.key_file.exists()

    def create(self) -> tuple[str, ...]:
        """Make what is missing and make private what is not; return a sentence for each thing done.

        Safe to repeat and to run in several processes at once: one key wins. A folder that was there before it was a
        workspace keeps its mode.

        Raises:
            WorkspaceError: the folder is somebody else's, others may write into it, or it cannot be made or made
                private.
        """
        done: list[str] = []
        try:
            done += self._settle()
            for folder in (self.http_state, self.links, self.run):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                done += self._make_private(folder, 0o700)
            if _write_new(self.key_file, make_key().text + "\n"):
                done.append(self._told_key())
            done += self._make_private(self.key_file, 0o600)
            if self.config_file.is_dir():
                text = f"{self.config_file} is a folder; move it away, and `moltbot init` writes the file."
                raise WorkspaceError(text)
            if _write_new(self.config_file, _TEMPLATE):
                done.append(f"wrote {self.config_file}, all comments: the defaults hold")
            _write_new(self.folder / ".gitignore", "# A workspace holds a key and conversations.\n*\n")
        except OSError as error:
            raise WorkspaceError(
                f"cannot make the workspace {self.folder}: {error.strerror} ({error.filename or self.folder}). "
                "Choose another folder with --workspace DIR or the variable MOLTBOT_WORKSPACE."
            ) from None
        self.read_key()
        return tuple(done)

    def _settle(self) -> Iterator[str]:
        """Make the folder, make that of a workspace private, and take any other as it is if it is fit for one."""
        if any("\ud800" <= letter <= "\udfff" for letter in str(self.folder)):
            raise WorkspaceError(f"the path {self.folder} is no text; choose another folder with --workspace DIR.")
        if not self.folder.is_dir():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            yield f"made the folder {self.folder}"
        elif not self._is_ours():
            self._check_found(self.http_state, self.run)
            if stat.S_IMODE(self.folder.stat().st_mode) & 0o077:
                _write_new(self._as_found, _AS_FOUND)
            return
        elif self._as_found.exists():
            self._check_found()
            return
        yield from self._make_private(self.folder, 0o700)

    @property
    def _as_found(self) -> Path:
        """Tells that the mode of the folder was not chosen here."""
        return self.folder / ".as-found"

    def _is_ours(self) -> bool:
        """Tell whether the folder holds a key or conversations of ours; one such as /tmp is everybody's in any case."""
        mode = stat.S_IMODE(self.folder.stat().st_mode)
        if mode & stat.S_ISVTX and mode & 0o022:
            return False
        if self.database.exists() or not self.key_file.is_file():
            return self.database.exists()
        with self.key_file.open("rb") as file:
            return parse_key(file.read(256).decode("ascii", "replace").strip()) is not None

    def _check_found(self, *inside: Path) -> None:
        """Refuse a folder that was there before where others could put something into a workspace, or lose something.

        `inside` are folders that would become the workspace's: others may use those that are there.
        """
        found = self.folder.stat()
        if found.st_uid != os.geteuid():
            raise WorkspaceError(_others(self.folder))
        if found.st_mode & 0o022:
            chmod = shlex.join(["chmod", "go-w", str(self.folder)])
            own = "" if found.st_mode & stat.S_ISVTX else f", or take their right away with `{chmod}`"
            raise WorkspaceError(
                f"others may write into {self.folder}, which is no place for a workspace: name a folder in it, which "
                f"is made for you alone, with {self._one_within()}{own}."
            )
        for folder in inside:
            if folder.is_dir() and stat.S_IMODE(folder.stat().st_mode) & 0o077:
                raise WorkspaceError(
                    f"{self.folder} is in use for something else: it has a folder {folder.name}, which a workspace "
                    f"keeps private. Name another one, such as {self._one_within()}."
                )

    def _one_within(self) -> str:
        """Return the option that names a folder within this one, as it is typed."""
        return shlex.join(["--workspace", str(self.folder / "moltbot")])

    def _told_key(self) -> str:
        """Return what is said of a key that was just made: callers may have had another one."""
        if not self.database.exists():
            return f"made a key in {self.key_file}, readable by you alone"
        return (
            f"made a new key in {self.key_file}, readable by you alone: there was a database, and no key. Who has the "
            "key of before is refused; to keep that one, put it back from a backup and start MoltBot again"
        )

    def _make_private(self, path: Path, mode: int) -> Iterator[str]:
        """Take rights of others away. Refuses what belongs to somebody else, and disks that keep no rights."""
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode) and path != self.folder:
            raise WorkspaceError(f"{path} is a link; a workspace holds its own files. Remove the link and try again.")
        found = path.stat()
        if found.st_uid != os.geteuid():
            raise WorkspaceError(_others(path))
        if not stat.S_IMODE(found.st_mode) & 0o077:
            return
        path.chmod(mode)
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise WorkspaceError(
                f"{path} cannot be made private: its disk keeps no rights (a Windows disk under WSL does not). "
                "Choose a folder of the Linux disk with --workspace DIR, such as ~/.moltbot."
            )
        yield f"made {path} private: other users of this machine could open it"

    def read_key(self) -> str:
        """Return the owner's key.

        Raises:
            WorkspaceError: there is no key, others can read it, or it is not a key.
        """
        try:
            descriptor = os.open(self.key_file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as file:
                mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
                text = file.read(256).decode("ascii", "replace").strip()
        except FileNotFoundError:
            if self.config_file.exists() or self.database.exists():
                raise WorkspaceError(
                    f"the workspace {self.folder} is there and its key is missing: put {self.key_file} back from a "
                    "backup; or, for a new key, stop MoltBot if it runs there, run `moltbot init`, and start it again."
                ) from None
            raise WorkspaceError(
                f"there is no workspace in {self.folder}: make one with `moltbot init`, or name one with --workspace."
            ) from None
        except OSError as error:
            raise WorkspaceError(f"the key {self.key_file} cannot be read: {error.strerror}.") from None
        if mode & 0o077:
            raise WorkspaceError(
                f"the key {self.key_file} can be read by other users: run `moltbot init`, which makes it private."
            )
        if parse_key(text) is None:
            raise WorkspaceError(
                f"{self.key_file} does not hold a key (its check does not fit): put the right one back, "
                "or delete the file and run `moltbot init` for a new key."
            )
        return text

    def mint_link(self, now: float, life: float = LINK_LIFE) -> str:
        """Return the code of a fresh one-time sign-in link, and clear away those that have ended. Times in seconds."""
        self.links.mkdir(mode=0o700, parents=True, exist_ok=True)
        for old in self.links.iterdir():
            # A link that somebody uses or clears at this moment is gone, which is what was wanted.
            with contextlib.suppress(OSError):
                if _link_end(old) <= now:
                    old.unlink()
        code = secrets.token_urlsafe(32)
        _write_new(self.links / hashlib.sha256(code.encode("ascii")).hexdigest(), f"{now + life:.0f}")
        return code


def find_workspace(environ: Mapping[str, str], given: Path | None = None) -> Workspace:
    """Return the workspace to use: the one given, `MOLTBOT_WORKSPACE`, `./.moltbot` if it exists, or `~/.moltbot`."""
    if given is None and environ.get("MOLTBOT_WORKSPACE"):
        given = Path(environ["MOLTBOT_WORKSPACE"])
    if given is None:
        here = Path.cwd() / ".moltbot"
        given = here if here.is_dir() else Path.home() / ".moltbot"
    return Workspace(folder=given.expanduser().absolute())


def _others(path: Path) -> str:
    return f"{path} belongs to another user; choose a folder of your own with --workspace DIR."


def _link_end(link: Path) -> float:
    """Return when a link ends; one without a time was cut off while it was written, and ends as any other would."""
    try:
        return float(link.read_text("ascii"))
    except ValueError:
        return link.stat().st_mtime + LINK_LIFE


def _write_new(path: Path, text: str) -> bool:
    """Write a private file whole, unless there is one already; return True when it was written."""
    if path.exists():
        return False
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        os.link(draft, path)  # unlike a rename, it never replaces what another process wrote meanwhile
    except FileExistsError:
        return False
    except OSError as error:  # writing names no file
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        draft.unlink()
    return True
