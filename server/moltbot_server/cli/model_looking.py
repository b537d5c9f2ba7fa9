"""`moltbot model list` and `moltbot model show`: what the workspace knows, joined with what the core has loaded."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moltbot.v1 import model_pb2

from moltbot_server.cli.asking import Place
from moltbot_server.cli.model_configured import configured_as
from moltbot_server.cli.model_place import Models, told
from moltbot_server.cli.tables import table
from moltbot_server.cli.terminal import Exit, Failure, as_typed, command, harmless, shown
from moltbot_server.errors import ModelUnavailable
from moltbot_server.models.encoder_folder import EncoderFolder
from moltbot_server.models.library import KnownModel, Origin
from moltbot_server.models.sizes import folder_size, readable


@told
def list_models(given: argparse.Namespace) -> int:
    """Print all models; return the exit status."""
    models = Models.of(given)
    place = models.core()
    loaded = loaded_models(place)
    entries = [_entry(models, model, loaded.get(model.name)) for model in models.all]
    known = {entry["name"] for entry in entries}
    entries += [_loaded_only(model) for name, model in loaded.items() if name not in known]
    at_start = models.at_start
    answers = next((name for name, model in loaded.items() if model.is_default), None)
    if given.json:
        found = {"running": place is not None, "answers": answers, "at_start": at_start or None, "models": entries}
        print(json.dumps(found | {"engine": models.elsewhere}))
        return int(Exit.OK)
    print(_table(entries, at_start))
    if place is None:
        print(f"\nMoltBot is not running: start it with `{command('start', models.workspace)}`.")
    if models.elsewhere:
        print(f"\nThe engine at {models.elsewhere} answers; its own workspace says with which model after a start.")
    elif place is not None and answers != at_start:
        print(f"\nAfter the next start {at_start} answers, not {answers}.")
    return int(Exit.OK)


@told
def show_model(given: argparse.Namespace) -> int:
    """Print one model; return the exit status, 1 for a model that cannot be used."""
    models = Models.of(given)
    place = models.core()
    loaded = loaded_models(place)
    if given.name in loaded and given.name not in {model.name for model in models.all}:
        entry = _loaded_only(loaded[given.name])
    else:
        _check_told(models, given.name, running=place is not None)
        model = models.find(given.name)
        entry = _entry(models, model, loaded.get(model.name)) | _details(models, model)
    entry["at_start"] = models.at_start == entry["name"]
    if given.json:
        print(json.dumps(entry, ensure_ascii=False))
    else:
        print(_in_words(entry, models))
    return int(Exit.FAILED if entry["problem"] and not entry["loaded"] else Exit.OK)


def _check_told(models: Models, name: str, *, running: bool) -> None:
    """Refuse what the configuration has and no core, with what lets one have it."""
    found = configured_as(models, name, {})
    if found is not None and found.where:
        why = "the core has not read that yet" if running else "MoltBot is not running"
        way = command("route reload" if running else "start", models.workspace)
        raise Failure(f"{found}. More is known of it while it can answer, and {why}: {way}")


def loaded_models(place: Place | None) -> dict[str, model_pb2.Model]:
    """Return the models of a core by name, the default one first; none without a core."""
    if place is None:
        return {}

    async def ask() -> dict[str, model_pb2.Model]:
        async with place.connect() as bot:
            return {model.name.removeprefix("models/"): model async for model in bot.models()}

    return asyncio.run(ask())


def _entry(models: Models, model: KnownModel, loaded: model_pb2.Model | None) -> dict[str, Any]:
    """Return what stands of a model in the JSON of `moltbot model list`. Sizes in bytes, lengths in tokens."""
    entry: dict[str, Any] = {
        "name": model.name,
        "origin": str(model.origin),
        "source": model.source,
        "path": str(models.library.path(model)),
        "family": model.type,
        "context_length": 0,
        "size": folder_size(models.library.path(model)),
        "problem": "",
        "loaded": _loaded(loaded),
    }
    try:
        folder = models.open(model)
    except ModelUnavailable as problem:
        return entry | {"problem": problem.message}
    return entry | {"family": folder.family, "context_length": folder.context_length}


def _loaded_only(model: model_pb2.Model) -> dict[str, Any]:
    """Return a model that the core has and the workspace does not know, as `_entry` does."""
    return {
        "name": model.name.removeprefix("models/"),
        "origin": "core",
        "source": "",
        "path": "",
        "family": model.type,
        "context_length": model.capabilities.context_length,
        "size": 0,
        "problem": "",
        "loaded": _loaded(model),
    }


def _loaded(model: model_pb2.Model | None) -> dict[str, Any] | None:
    """Return how a model is in the core."""
    if model is None:
        return None
    can = model.capabilities
    return {
        "state": model_pb2.ModelState.Name(model.state).removeprefix("MODEL_STATE_").lower(),
        "message": model.state_message,
        "default": model.is_default,
        "memory": model.memory_bytes,
        "parallel": model.parallel,
        "context_length": can.context_length,
        "capabilities": [field.name for field, value in can.ListFields() if value is True],
    }


def _details(models: Models, model: KnownModel) -> dict[str, Any]:
    """Return what only `moltbot model show` tells."""
    try:
        folder = models.open(model)
    except ModelUnavailable:
        return {}
    about = {
        "display_name": folder.display_name,
        "tokenizer": folder.tokenizer.name,
        "files": sorted(path.name for path in folder.path.iterdir()),
    }
    if isinstance(folder, EncoderFolder):
        return about | {"pooling": folder.pooling, "capabilities": ["embeddings"]}
    # Late: it loads the native code of models, which no list needs.
    from moltbot_server.models.building import build_engine

    can = build_engine(model_type=model.type, model_path=str(folder.path), model_id=model.name).capabilities
    return about | {
        "vocabulary": len(folder.vocabulary),
        "template": "its own, in Jinja" if folder.jinja else "a text before and after each message",
        "ends": [*dict.fromkeys([folder.eos_token, *folder.template.stop])],
        "capabilities": [name for name in can.__struct_fields__ if getattr(can, name) is True],
    }


def _table(entries: Sequence[Mapping[str, Any]], at_start: str) -> str:
    rows = [("NAME", "STATE", "FAMILY", "CONTEXT", "SIZE", "FROM")]
    for entry in entries:
        rows.append(
            (
                entry["name"],
                _state(entry, at_start),
                entry["family"] or "-",
                str(entry["context_length"] or "-"),
                readable(entry["size"]) if entry["size"] else "-",
                _origin(entry),
            )
        )
    problems = [f"{entry['name']}: {entry['problem']}" for entry in entries if entry["problem"]]
    return harmless("\n".join([table(rows), *([""] if problems else []), *problems]))


def _state(entry: Mapping[str, Any], at_start: str) -> str:
    loaded = entry["loaded"]
    if loaded:
        word = "answers" if loaded["default"] and loaded["state"] == "ready" else str(loaded["state"])
        return f"{word}, {readable(loaded['memory'])}" if loaded["memory"] else word
    if entry["problem"] and entry["family"] != "scripted":
        return "not usable"
    return "at start" if entry["name"] == at_start else "-"


def _origin(entry: Mapping[str, Any]) -> str:
    if entry["origin"] in (Origin.PULLED, Origin.CONVERTED):
        return f"{entry['origin']}: {entry['source']}" if entry["source"] else str(entry["origin"])
    return shown(Path(entry["path"])) if entry["origin"] in (Origin.ADDED, Origin.CONFIGURED) else str(entry["origin"])


def _in_words(entry: Mapping[str, Any], models: Models) -> str:
    loaded = entry["loaded"]
    lines = [f"{entry['name']}" + (f"  {entry['display_name']}" if entry.get("display_name") else "")]
    pairs = [
        ("From", f"{entry['origin']}" + (f", {entry['source']}" if entry["source"] else "")),
        ("Folder", shown(Path(entry["path"])) if entry["path"] else ""),
        ("Size", readable(entry["size"]) if entry["size"] else ""),
        ("Family", entry["family"]),
        ("Context", f"{entry['context_length']} tokens" if entry["context_length"] else ""),
        (
            "Tokenizer",
            entry.get("tokenizer", "") + (f", {entry['vocabulary']} tokens" if "vocabulary" in entry else ""),
        ),
        ("Pooling", entry.get("pooling", "")),
        ("Template", entry.get("template", "")),
        ("Ends with", "  ".join(entry.get("ends", ()))),
        ("Can", ", ".join(entry.get("capabilities") or (loaded or {}).get("capabilities", ())).replace("_", " ")),
        ("Files", ", ".join(entry.get("files", ()))),
        ("Runs", as_typed(_runs(loaded), models.workspace) if loaded else "no"),
        ("At start", "answers" if entry["at_start"] else ""),
        ("Problem", entry["problem"]),
    ]
    lines += [f"  {name:10} {text}" for name, text in pairs if text]
    embeds = "embeddings" in entry.get("capabilities", ())
    known = entry["origin"] != "core"  # what the configuration or a program brought is not switched to by hand
    if known and not embeds and not entry["problem"] and not entry["at_start"] and not (loaded and loaded["default"]):
        switch = command(f"model switch {entry['name']}", models.workspace)
        lines.append(f"Let it answer: {switch}")
    return harmless("\n".join(lines))


def _runs(loaded: Mapping[str, Any]) -> str:
    parts = [f"{loaded['state']}{', answers by default' if loaded['default'] else ''}"]
    parts += [f"{readable(loaded['memory'])} of memory"] if loaded["memory"] else []
    parts += [f"{loaded['parallel']} answers at once"] if loaded["parallel"] else []
    parts += [loaded["message"]] if loaded["message"] else []
    return ", ".join(parts)
