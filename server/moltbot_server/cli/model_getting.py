"""`moltbot model pull | convert`: how models come here."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
from pathlib import Path

from moltbot_server.cli.model_configured import check_free, configured_as
from moltbot_server.cli.model_place import Models, by_option, check_family, told
from moltbot_server.cli.progress import Progress
from moltbot_server.cli.terminal import Exit, Failure, command, harmless, interrupted, shown
from moltbot_server.config_sources import read_env_file
from moltbot_server.errors import ModelExists, ModelUnavailable
from moltbot_server.models.hub import DEFAULT_HUB, Hub, HubError, Listing, Source, parse_hub, parse_source
from moltbot_server.models.library import KnownModel, Origin, check_name, name_of
from moltbot_server.models.pull import Pull, Selection, check_files, select
from moltbot_server.models.sizes import readable
from moltbot_server.workspace import Workspace

HUB, TOKEN = "MOLTBOT_HUB", "MOLTBOT_HUB_TOKEN"


@told
def pull_model(given: argparse.Namespace) -> int:
    """Fetch a model from a hub and add it; return the exit status."""
    check_family(given.type)
    models = Models.of(given, make=True)
    try:
        address, token = _hub(models.workspace)
        source = parse_source(given.source, address, given.revision)
        # A token is for the hub that was set up, not for whatever address somebody pastes.
        own = parse_hub(source.hub).origin() == parse_hub(address).origin()
        name = given.name or name_of(source.repository.rpartition("/")[2])
        check_name(name)
        check_free(models, name)
        here = _here(models, name, source)
        # One that was asked for without a revision is the one that is here, online or not.
        if here is not None and source.revision == "main":
            _report(given, models, here)
            return int(Exit.OK)
        return asyncio.run(_pull(given, models, source, token if own else "", name, here))
    except HubError as problem:
        raise Failure(str(problem)) from None
    except KeyboardInterrupt:
        text = "stopped. What came is kept: the same command goes on from there."
        return interrupted(text, as_json=given.json)


async def _pull(
    given: argparse.Namespace, models: Models, source: Source, token: str, name: str, here: KnownModel | None
) -> int:
    async with Hub(source.hub, token=token) as hub:
        listing = await hub.listing(source, lambda text: None if given.json else _note(text))
        origin = _origin(listing, hub.host)
        if here is not None and here.source != origin:
            raise ModelExists(
                f"{name} is here as {here.source}, and this is {origin}: fetch it beside with --name, or remove {name}."
            )
        if here is not None:
            _report(given, models, here)
            return int(Exit.OK)
        check_files(listing.files)
        chosen = select(listing.files, given.include)
        _check_use(chosen, source, asked=bool(given.include))
        if not given.json:
            count = f"{len(chosen.files)} of {len(listing.files)} files"
            print(f"{source} on {hub.host} has {chosen.weights}: {count}, {readable(chosen.size)}.", flush=True)
        with Progress(name, max(chosen.size, 2), quiet=given.json) as bar:
            partial = models.library.folder / f".{name}.partial"
            await Pull(hub, listing, chosen.files, partial, bar).run()
    model = KnownModel(name=name, origin=Origin.PULLED, type=given.type, source=origin)
    models.library.add(model, replace=True, folder=partial)
    _report(given, models, model)
    return int(Exit.OK)


def _hub(workspace: Workspace) -> tuple[str, str]:
    """Return the address of the hub and the token for it: of the environment, or else of the workspace's `.env`."""
    kept = read_env_file(workspace.folder / ".env", [])
    found = {name: os.environ.get(name, "") or str(kept[name].value if name in kept else "") for name in (HUB, TOKEN)}
    return found[HUB].strip() or DEFAULT_HUB, found[TOKEN].strip()


def _here(models: Models, name: str, source: Source) -> KnownModel | None:
    """Return what was pulled of a repository already, if it is still here.

    Raises:
        ModelExists: another model has the name, or something lies where it would go.
    """
    if not models.library.knows(name):
        models.library.check_free(name)
        return None
    known = models.library.find(name)
    if known.origin is not Origin.PULLED or f"{source.repository}@" not in known.source:
        raise ModelExists(f"There is another model {name} already; choose another name with --name.")
    return known if models.library.path(known).is_dir() else None


def _check_use(chosen: Selection, source: Source, *, asked: bool) -> None:
    """Refuse gigabytes that nobody here could use."""
    if not asked and not chosen.weights.convertible and "CTranslate2" not in chosen.weights:
        raise HubError(
            f"{source} has {chosen.weights}; MoltBot runs CTranslate2 weights and converts safetensors. Look for the "
            "same model in one of these forms, or name the files with --include to fetch them all the same."
        )
    if not chosen.files:
        raise HubError(f"{source} has no file that --include names.")


def _origin(listing: Listing, host: str) -> str:
    prefix = "" if listing.source.hub == DEFAULT_HUB else f"{host}/"
    return f"{prefix}{listing.source.repository}@{listing.commit[:12]}"


def _note(text: str) -> None:
    print(harmless(text), file=sys.stderr, flush=True)


@told
def convert_model(given: argparse.Namespace) -> int:
    """Convert weights of Transformers and add the result; return the exit status."""
    from moltbot_server.models.convert import convert

    models = Models.of(given, make=True)
    source, origin = _source(models, given.source)
    name = given.name or name_of(f"{origin.rpartition('/')[2]}-{given.quantization.replace('_', '-')}")
    check_name(name)
    check_free(models, name)
    if models.library.knows(name):
        raise ModelExists(f"There is a model {name} already; choose another name with --name.")
    models.library.check_free(name)
    fresh = models.library.folder / f".{name}.converted"
    shutil.rmtree(fresh, ignore_errors=True)  # what a conversion that was killed has left
    fresh.parent.mkdir(parents=True, exist_ok=True)
    try:
        with Progress(f"Converting {name}", quiet=given.json) as bar:
            convert(source, fresh, given.quantization, lambda stage, share: bar.reach(share, f"{stage} {name}"))
        model = KnownModel(name=name, origin=Origin.CONVERTED, source=f"{origin} as {given.quantization}")
        models.library.add(model, folder=fresh)
    except KeyboardInterrupt:
        return interrupted("stopped. Nothing of the conversion is left.", as_json=given.json)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    _report(given, models, model)
    return int(Exit.OK)


def _source(models: Models, text: str) -> tuple[Path, str]:
    """Return the folder to convert, and what to call it."""
    path = Path(text).expanduser().absolute()
    if path.is_dir():
        return path, path.name
    if models.library.knows(text):
        return models.library.path(models.library.find(text)), text
    if (found := configured_as(models, text, {})) is not None and found.where:
        raise Failure(f"{found}, and has no files here: there is nothing to convert.")
    raise Failure(
        f"{text} is neither a folder nor a model that is known; fetch one with "
        f"`{command('model pull NAME', models.workspace)}`."
    )


def _report(given: argparse.Namespace, models: Models, model: KnownModel) -> None:
    """Say what is here now and what to do with it."""
    problem = ""
    try:
        models.open(model)
    except ModelUnavailable as found:
        problem = found.message
    path = models.library.path(model)
    if given.json:
        found_here = {"name": model.name, "path": str(path), "source": model.source, "problem": problem}
        print(json.dumps(found_here, ensure_ascii=False))
        return
    print(f"{model.name} is in {shown(path)} ({model.source}).")
    if not problem:
        print(f"Let it answer: {command(f'model switch {model.name}', models.workspace)}")
    else:
        print(f"It cannot answer as it is: {by_option(problem)}")
        if "MODEL_TYPE" in problem:
            print(f"Name its family: {command(f'model add {model.name} --type FAMILY', models.workspace)}")
