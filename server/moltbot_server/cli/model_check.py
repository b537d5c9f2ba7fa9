"""Looks at the files of a configured model before anything starts; the weights themselves are not loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_KEYS = ("model_type", "model_path", "context_length")


def model_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the model that a configuration names: the key, and what was found and expected."""
    given = [key for key in _KEYS if values.get(key)]
    if not given:
        return  # the built-in model at its full length: nobody's mistake, and nothing to load for it here
    # Late: it costs the supervisor 4 MB, which the built-in model should not.
    from moltbot_server.errors import ModelUnavailable
    from moltbot_server.models.folder import BUILTIN_NAMES, SCRIPTED, check_context, configured_folder

    kind, path, length = (values.get(key) for key in _KEYS)
    kind = (kind or "").strip().lower()
    if kind == SCRIPTED:
        if path and not path.is_file():
            yield "model_path", f"MODEL_PATH {path}: expected the YAML file of a script, or nothing"
        return
    if kind and not path and kind not in BUILTIN_NAMES:
        return  # the settings tell that the path is missing
    try:
        folder = configured_folder(kind, str(path or ""))
    except ModelUnavailable as problem:
        about_type = "model_type" in given and (not path or problem.message.startswith("MODEL_TYPE"))
        yield "model_type" if about_type else "model_path" if path else given[0], problem.message
        return
    if length:
        try:
            check_context(length, folder.context_length, folder.id)
        except ModelUnavailable as problem:
            yield "context_length", problem.message
