"""`moltbot model add | remove | switch`: what changes in the library, and in the core while it runs."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path

from moltbot import MoltBot, MoltBotClientError
from moltbot.v1 import model_pb2

from moltbot_server.cli.asking import Place
from moltbot_server.cli.model_configured import check_free, configured_as
from moltbot_server.cli.model_looking import loaded_models
from moltbot_server.cli.model_place import Models, by_option, told
from moltbot_server.cli.progress import Progress
from moltbot_server.cli.terminal import Exit, Failure, command, harmless, shown
from moltbot_server.errors import ModelExists, ModelUnavailable
from moltbot_server.models.encoder_folder import EncoderFolder
from moltbot_server.models.folder import is_encoder
from moltbot_server.models.library import KnownModel, Origin, name_of, open_folder, overruled_by


@told
def add_model(given: argparse.Namespace) -> int:
    """Add a folder, or correct the family of a model that is known; return the exit status."""
    try:
        return _add(given)
    except ModelUnavailable as problem:
        raise Failure(by_option(problem.message)) from None


def _add(given: argparse.Namespace) -> int:
    models = Models.of(given, make=True)
    path = Path(given.path).expanduser().absolute()
    if not path.is_dir() and models.library.knows(given.path):
        model = _retyped(models, given)
    else:
        opened = open_folder(path, given.type)  # what cannot be read is not taken in
        name = given.name or name_of(opened.id)
        check_free(models, name)
        model = KnownModel(name=name, origin=Origin.ADDED, path=str(path), type=given.type)
        known = models.library.knows(name)
        if known and models.library.path(models.library.find(name)) != path:
            other = shown(models.library.path(models.library.find(name)))
            raise ModelExists(f"There is a model {name} already, in {other}; choose another name with --name.")
        models.library.add(model, replace=known)
    folder = models.open(model)
    if given.json:
        print(json.dumps({"name": model.name, "path": str(folder.path), "family": folder.family}, ensure_ascii=False))
    else:
        what = f"{folder.family or 'a model'} with {folder.context_length} tokens of context"
        print(f"{model.name} is in the list: {what}, in {shown(folder.path)}.")
        if not isinstance(folder, EncoderFolder):
            print(f"Let it answer: {command(f'model switch {model.name}', models.workspace)}")
    return int(Exit.OK)


def _retyped(models: Models, given: argparse.Namespace) -> KnownModel:
    model = models.library.find(given.path)
    if not given.type or given.name or model.origin is Origin.BUILT_IN:
        raise Failure(f"{given.path} is in the list already; give --type FAMILY to correct its family.", Exit.USAGE)
    corrected = KnownModel(name=model.name, origin=model.origin, path=model.path, source=model.source, type=given.type)
    models.library.open(corrected)
    models.library.add(corrected, replace=True)
    return corrected


@told
def remove_model(given: argparse.Namespace) -> int:
    """Forget a model, and delete what MoltBot fetched or made of it; return the exit status."""
    models = Models.of(given)
    place = models.core()
    _check_has_files(models, given.name, place)
    model = models.library.find(given.name)
    loaded = loaded_models(place).get(model.name)
    if loaded is not None and loaded.is_default:
        other = command("model switch NAME", models.workspace)
        raise Failure(f"{model.name} is the model that answers now; let another one answer first: {other}")
    folder = models.library.path(model)
    if models.library.owns(model) and models.settings.model_path == folder:
        where = models.settings.origin("model_path")
        raise Failure(f"{where} names the folder of {model.name}; take that line out first.")
    models.library.check_removable(model)
    if loaded is not None and place is not None:
        asyncio.run(_unload(place, model.name))
    models.library.remove(model.name)
    deleted = models.library.owns(model)
    if given.json:
        print(json.dumps({"name": model.name, "deleted": deleted}))
    elif deleted:
        print(f"{model.name} is gone, with its files.")
    else:
        print(f"{model.name} is no longer in the list; its folder {shown(folder)} stays as it is.")
    return int(Exit.OK)


@told
def switch_model(given: argparse.Namespace) -> int:
    """Let another model answer, now or from the next start on; return the exit status."""
    if bool(given.name) == given.configured:
        raise Failure("name the model that is to answer, or give --configured alone.", Exit.USAGE)
    models = Models.of(given, make=True)
    place = models.core() if given.name else None
    if models.elsewhere and (place is None or given.default):
        # What would be written down here is read by nobody.
        there = "Switch in the engine's own workspace, or here while MoltBot runs and without --default"
        raise Failure(f"{_decides(models)} {there}.")
    if given.configured:
        models.library.choose("")
        _say(given, {"at_start": models.at_start}, f"From the next start on {models.at_start} answers.")
        return int(Exit.OK)
    names = loaded_models(place)
    _check_place(models, given.name, names)
    model = models.find(given.name)
    if is_encoder(models.library.path(model)):
        raise Failure(f"{model.name} turns texts into vectors and writes no answers; switch to a model that does.")
    if model.name not in names:
        _check_folder(models, model)
    previous = ""
    if place is not None:
        previous = asyncio.run(_switch(place, models, model, loaded=model.name in names, given=given))
    if given.default or place is None:
        _keep(models, model)
    _tell(given, models, model, running=place is not None, previous=previous)
    return int(Exit.OK)


def _check_place(models: Models, name: str, loaded: Mapping[str, model_pb2.Model]) -> None:
    """Refuse a model or a route of the configuration, which answer whoever names them, with what to do instead."""
    if (found := configured_as(models, name, loaded)) is None:
        return
    file, reload = shown(models.workspace.config_file), command("route reload", models.workspace)
    if found.is_route:
        way = f"To let it answer when none is named, write its models under `models:` in {file}"
        raise Failure(f"{name} is a route, which answers who names it. {way}, and then: {reload}")
    way = f"To let it answer when none is named, write `models: {{primary: {name}}}` into {file}"
    raise Failure(f"{name} is not on this machine, and answers who names it. {way}, and then: {reload}")


def _check_has_files(models: Models, name: str, place: Place | None) -> None:
    """Refuse to remove what the configuration has, with where that is."""
    if models.library.knows(name):
        return
    found = configured_as(models, name, loaded_models(place))
    if found is not None and found.where:
        reload = command("route reload", models.workspace)
        raise Failure(f"{found}, and has no files here. To be without it, take it out there, and then: {reload}")


def _check_folder(models: Models, model: KnownModel) -> None:
    """Refuse before anything is loaded what the files alone tell."""
    try:
        folder = models.open(model)
    except ModelUnavailable as problem:
        raise Failure(f"{model.name} cannot answer: {problem.message}") from None
    asked = models.settings.context_length
    if asked and asked > folder.context_length:
        where = models.settings.origin("context_length")
        raise Failure(
            f"{where} asks for a context of {asked} tokens and {model.name} reads {folder.context_length}; "
            "take that line out, or lower it."
        )


async def _switch(place: Place, models: Models, model: KnownModel, *, loaded: bool, given: argparse.Namespace) -> str:
    """Load, switch and let the one before go; return the name of the one before."""
    async with place.connect() as bot:
        if not loaded:
            await _load(bot, models, model, quiet=given.json)
        answer = await bot.switch_model(model.name)
        previous = answer.previous.removeprefix("models/")
        if previous and previous != model.name and not given.keep and not models.routed:
            await _let_go(bot, previous)
    return previous


async def _load(bot: MoltBot, models: Models, model: KnownModel, *, quiet: bool) -> None:
    path, length = str(models.library.path(model)), models.settings.context_length or 0
    try:
        with Progress(f"Loading {model.name}", quiet=quiet) as bar:
            steps = bot.load_model(model.name, path, type=model.type, context_length=length)
            async with aclosing(steps) as responses:
                async for response in responses:
                    bar.reach(response.progress, f"{response.stage or 'loading'} {model.name}".capitalize())
    except asyncio.CancelledError:
        _warn(f"{model.name} is still being loaded; what answers stays the same until you switch.")
        raise
    except MoltBotClientError as problem:
        if problem.reason != "MODEL_EXISTS":
            raise
        raise Failure(
            f"The core has another model loaded as {model.name}; start it again, or add this one by another name."
        ) from None


async def _let_go(bot: MoltBot, name: str) -> None:
    """Free the memory of the model that answered until now; that the other one answers holds in any case."""
    try:
        await bot.unload_model(name)
    except MoltBotClientError as problem:
        _warn(f"{name} could not be unloaded and keeps its memory: {problem.message}")


async def _unload(place: Place, name: str) -> None:
    async with place.connect() as bot:
        await bot.unload_model(name)


def _keep(models: Models, model: KnownModel) -> None:
    """Let a model answer from the next start on."""
    models.library.choose("" if model.origin is Origin.CONFIGURED else model.name)
    if models.at_start != model.name and (where := overruled_by(models.settings)):
        _warn(f"{where} names another model, which goes before this choice at the next start: take it out there.")


def _tell(given: argparse.Namespace, models: Models, model: KnownModel, *, running: bool, previous: str) -> None:
    at_start = models.at_start
    found = {"name": model.name, "running": running, "previous": previous, "at_start": at_start or None}
    again = command(f"model switch {model.name} --default", models.workspace)
    if not running:
        words = f"From the next start on {at_start} answers: {command('start', models.workspace)}"
    elif models.elsewhere:
        words = f"{model.name} answers. {_decides(models)}"
    elif at_start == model.name:
        words = f"{model.name} answers, also after the next start."
    elif models.routed:
        words = f"{model.name} answers. After the next start the route in moltbot.yaml does; change it there."
    elif given.default:
        words = f"{model.name} answers. After the next start {at_start} does."
    else:
        words = f"{model.name} answers. After the next start {at_start} does; to keep this one: {again}"
    _say(given, found, words)


def _decides(models: Models) -> str:
    return f"Which model answers after a start is for the engine at {models.elsewhere} to say."


def _say(given: argparse.Namespace, found: dict[str, object], words: str) -> None:
    print(json.dumps(found, ensure_ascii=False) if given.json else words, flush=True)


def _warn(text: str) -> None:
    print(harmless(f"moltbot: {text}"), file=sys.stderr, flush=True)
