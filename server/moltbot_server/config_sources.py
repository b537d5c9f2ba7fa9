"""Where settings come from: a YAML file, environment files, the environment, flags. Every value knows its place."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import yaml

_LARGEST_FILE = 1 << 20
_DEEPEST = 16
_ENV_LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong with the configuration: the place, such as `moltbot.yaml:3`, and what to do."""

    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" if self.where else self.text


class ConfigError(Exception):
    """The configuration cannot be used; `problems` tells all that is wrong with it. The process leaves with 78."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """A value as it was written: text, a list, a mapping or nothing; its place; the folder that paths are based on."""

    value: str | tuple[Given, ...] | Mapping[str, Given] | None
    where: str
    folder: Path

    def __str__(self) -> str:
        if self.value is None:
            return "nothing"
        if isinstance(self.value, str):
            return repr(self.value) if len(self.value) <= 60 else repr(self.value[:57] + "...")
        return "a list" if isinstance(self.value, tuple) else "a mapping"


def places(given: Mapping[str, Given], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield each key and all inside it, by dotted keys and the numbers of items, with its place."""
    for name, value in given.items():
        key = f"{prefix}{name}"
        yield key, value.where
        inside = value.value
        if isinstance(inside, tuple):
            inside = {str(number): item for number, item in enumerate(inside)}
        if isinstance(inside, Mapping):
            yield from places(inside, f"{key}.")


def place_of(places: Mapping[str, str], key: str) -> str:
    """Return where a key stands, or else the nearest section that it lies in; empty where nothing of it is written."""
    while key and key not in places:
        key = key.rpartition(".")[0]
    return places.get(key, "")


def read_text(path: Path) -> str | None:
    """Return a configuration file's text, or None when there is no such file.

    Raises:
        ConfigError: the file cannot be read, is none that keeps its text, is over 1 MiB, or is not UTF-8.
    """
    try:
        # Without waiting: who would write into a pipe may never come.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not _keeps_text(os.fstat(file.fileno())):
                text = "this is no regular file, such as a pipe or a device; a configuration is read again and again"
                raise ConfigError(Problem(where=str(path), text=text))
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise ConfigError(Problem(where=str(path), text="the file is over 1 MiB; this cannot be a configuration"))
        return content.decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(Problem(where=f"{path}:{line}", text="the file is not UTF-8 text")) from None
    except OSError as error:
        raise ConfigError(Problem(where=str(path), text=f"cannot be read: {error.strerror}")) from None


def _keeps_text(found: os.stat_result) -> bool:
    """Tell whether a file can be read again with the same result; `/dev/null`, where nothing is wanted, can."""
    return stat.S_ISREG(found.st_mode) or found.st_rdev == os.stat(os.devnull).st_rdev


def read_yaml(path: Path, problems: list[Problem]) -> Mapping[str, Given]:
    """Return the top level of a YAML file; empty when the file is missing or empty. Adds to `problems`."""
    text = read_text(path)
    if text is None or all(not line.strip() or line.lstrip().startswith("#") for line in text.splitlines()):
        return {}
    # Late: a tenth of the start and 4 MB in each process, for a file that is most often comments only.
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problems.append(Problem(where=f"{path}:{line}", text=f"not valid YAML: {error.problem}"))
        return {}
    except (yaml.YAMLError, RecursionError) as error:
        problems.append(Problem(where=str(path), text=f"not valid YAML: {str(error).splitlines()[0]}"))
        return {}
    given = _from_node(node, path, problems, 0) if node else None
    if given is None or given.value is None:
        return {}
    if isinstance(given.value, Mapping):
        return given.value
    problems.append(Problem(where=given.where, text=f"found {given}, expected keys such as `port: 8000`"))
    return {}


def _from_node(node: yaml.Node, path: Path, problems: list[Problem], depth: int) -> Given:
    where = f"{path}:{node.start_mark.line + 1}"
    if depth > _DEEPEST:
        problems.append(Problem(where=where, text="nested too deeply"))
        return Given(value=None, where=where, folder=path.parent)
    value: str | tuple[Given, ...] | Mapping[str, Given] | None
    kind: str = node.id  # type: ignore[attr-defined]  # each class of node has one, which the stubs do not know
    if kind == "mapping":
        value = _mapping(node, path, problems, depth)
    elif kind == "sequence":
        value = tuple(_from_node(item, path, problems, depth + 1) for item in node.value)
    else:
        value = None if node.tag == "tag:yaml.org,2002:null" else str(node.value)
    return Given(value=value, where=where, folder=path.parent)


def _mapping(node: yaml.Node, path: Path, problems: list[Problem], depth: int) -> dict[str, Given]:
    value: dict[str, Given] = {}
    for key_node, value_node in node.value:
        key, where = str(key_node.value), f"{path}:{key_node.start_mark.line + 1}"
        if key_node.id != "scalar":
            problems.append(Problem(where=where, text="a key must be a plain word"))
        elif key in value:
            first = value[key].where.rpartition(":")[2]
            problems.append(Problem(where=where, text=f"`{key}` is given twice, first on line {first}; keep one"))
        else:
            # The key's line, not the value's: this is where a person looks.
            given = _from_node(value_node, path, problems, depth + 1)
            value[key] = Given(value=given.value, where=where, folder=given.folder)
    return value


def read_env_file(path: Path, problems: list[Problem]) -> Mapping[str, Given]:
    """Return the `NAME=value` lines of an environment file; empty when it is missing. Adds to `problems`.

    Blank lines, `# comments`, `export NAME=value` and values in quotes are understood; nothing is expanded. Of a name
    that is given twice, the last line is returned, for those who pass problems over.
    """
    found: dict[str, Given] = {}
    for number, line in enumerate((read_text(path) or "").splitlines(), 1):
        stripped, where = line.strip(), f"{path}:{number}"
        if not stripped or stripped.startswith("#"):
            continue
        match = _ENV_LINE.fullmatch(stripped)
        if match is None:
            problems.append(Problem(where=where, text="expected NAME=value, a comment or a blank line"))
            continue
        name = match[1]
        if name in found:
            first = found[name].where.rpartition(":")[2]
            problems.append(Problem(where=where, text=f"`{name}` is given twice, first on line {first}; keep one"))
        found[name] = Given(value=_unquoted(match[2]), where=where, folder=path.parent)
    return found


def _unquoted(text: str) -> str:
    if text[:1] in ("'", '"'):
        end = text.find(text[0], 1)
        if end > 0 and (not text[end + 1 :].strip() or text[end + 1 :].lstrip().startswith("#")):
            return text[1:end]
    return re.split(r"\s#", text, maxsplit=1)[0].strip()


def read_environ(environ: Mapping[str, str]) -> Iterator[tuple[str, Given]]:
    """Yield the variables of a process environment."""
    folder = Path.cwd()
    for name, text in environ.items():
        yield name, Given(value=text, where=f"environment variable {name}", folder=folder)


def read_flags(flags: Mapping[str, object]) -> Iterator[tuple[str, Given]]:
    """Yield command-line flags by the key that they override; a flag that was not given (None) is left out."""
    folder = Path.cwd()
    for key, value in flags.items():
        if value is not None:
            where = "--" + key.replace("_", "-").replace(".", "-")
            if isinstance(value, list | tuple):
                items = tuple(Given(value=str(item), where=where, folder=folder) for item in value)
                yield key, Given(value=items, where=where, folder=folder)
            else:
                yield key, Given(value=str(value), where=where, folder=folder)
