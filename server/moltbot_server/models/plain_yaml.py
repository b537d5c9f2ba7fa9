"""YAML that others have written, such as a model's description: read so that no content of it ends the process."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TypeVar

import msgspec
import yaml

T = TypeVar("T")

_LARGEST = 1 << 20


def read_plain_yaml(file: Path, kind: type[T]) -> T:
    """Return what a YAML file of at most 1 MiB holds, as a value of a kind.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large or no YAML, or holds no such value; the text says what is wrong.
    """
    with file.open("rb") as opened:
        content = opened.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError("it is over 1 MiB")
    try:
        # Not libyaml's loader, which msgspec takes: what is nested deeply overflows its stack and ends the process.
        value = yaml.load(content, Loader=yaml.SafeLoader)
        return msgspec.convert(value, kind, builtin_types=(datetime.datetime, datetime.date))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, msgspec.ValidationError) as problem:
        raise ValueError(str(problem)) from None
