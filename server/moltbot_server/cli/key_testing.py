"""`moltbot key test`: a word from each provider with each of its keys."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

from moltbot_server.auth.provider_keys import HeldKeys
from moltbot_server.cli.key_keeping import Keys, in_words
from moltbot_server.cli.terminal import Exit, Failure, as_typed, command, harmless
from moltbot_server.config import Provider, ProviderModel, Settings
from moltbot_server.errors import ModelNotFound, MoltBotError
from moltbot_server.models.engine import stream
from moltbot_server.models.providers import ProviderEngine, ProviderKey, presets, resolve
from moltbot_server.turns import GenerationOptions, Message, Role, TextPart
from moltbot_server.workspace import Workspace

_PATIENCE = 60.0
_QUESTION = (Message(role=Role.USER, parts=(TextPart(text="Say: yes"),)),)
_FEW = GenerationOptions(max_output_tokens=16)


class _Single:
    """A key ring of one key, so that no other stands in for it."""

    def __init__(self, key: ProviderKey | None) -> None:
        self._keys = () if key is None else (key,)

    def keys(self, provider: str) -> Sequence[ProviderKey]:
        """Return the key, whoever asks."""
        return self._keys


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tried:
    """How it went with one key; `seconds` to the end of the answer. Without a `problem` the key works."""

    provider: str
    model: str
    key: str
    seconds: float = 0.0
    problem: str = ""


@in_words
def test_keys(given: argparse.Namespace) -> int:
    """Try the keys of one provider or of all; return 0 when each works."""
    keys = Keys.of(given)
    held = keys.held()
    names = [given.provider] if given.provider else list(dict.fromkeys(key.provider for key in held.all))
    if given.provider:
        keys.check_provider(given.provider)
    if not names:
        raise Failure(f"there is no key yet; add one: {command('key add PROVIDER', keys.workspace)}")
    # What the engine has to log of a refused key is told in the line of that key.
    logging.getLogger().addHandler(logging.NullHandler())
    tried = asyncio.run(_try_all(keys.settings, held, names, given.model))
    _tell(given, tried, keys.workspace)
    return int(Exit.FAILED if any(one.problem for one in tried) else Exit.OK)


async def _try_all(
    settings: Settings, held: HeldKeys[ProviderKey], names: Sequence[str], asked: str
) -> Sequence[_Tried]:
    tried = []
    for name in names:
        try:
            provider, model = _target(settings, name, asked)
        except MoltBotError as problem:
            tried.append(_Tried(provider=name, model="", key="", problem=harmless(problem.message)))
        else:
            tried += [await _try(provider, model, key) for key in held.by_provider.get(name, ()) or (None,)]
    return tried


async def _try(provider: Provider, model: ProviderModel, key: ProviderKey | None) -> _Tried:
    name, began = key.id if key else "", time.perf_counter()
    try:
        engine = ProviderEngine(provider, model, keys=_Single(key))
        await engine.start()
        try:
            async with asyncio.timeout(_PATIENCE), aclosing(stream(engine, _QUESTION, _FEW)) as pieces:
                async for _ in pieces:
                    pass
        finally:
            await engine.close()
    except MoltBotError as problem:
        return _Tried(provider=provider.name, model=model.name, key=name, problem=harmless(problem.message))
    except TimeoutError:
        text = f"no answer within {_PATIENCE:g} s."
        return _Tried(provider=provider.name, model=model.name, key=name, problem=text)
    return _Tried(provider=provider.name, model=model.name, key=name, seconds=time.perf_counter() - began)


def _target(settings: Settings, name: str, asked: str) -> tuple[Provider, ProviderModel]:
    """Return the provider of a name, and the model to ask it for: told, of a route, listed, or the cheapest known."""
    provider = next((each for each in settings.providers if each.name == name), None) or Provider(name=name)
    if asked:
        return resolve(f"{name}/{asked.removeprefix(f'{name}/')}", settings.providers)
    for route in (settings.models, *settings.routes):
        for wanted in filter(None, (route.primary, *route.fallback)):
            try:
                found, model = resolve(wanted, settings.providers)
            except ModelNotFound:
                continue  # a model of this machine
            if found.name == name:
                return found, model
    if provider.models:
        return provider, provider.models[0]
    preset = presets().get(provider.preset or name)
    exact = {model: facts for model, facts in preset.models.items() if "*" not in model} if preset else {}
    if exact:
        cheapest = min(exact, key=lambda model: exact[model].price or (float("inf"),))
        return resolve(f"{name}/{cheapest}", settings.providers)
    raise ModelNotFound("Which of its models is to be asked? Name one with --model, or in a route.")


def _tell(given: argparse.Namespace, tried: Sequence[_Tried], workspace: Workspace) -> None:
    if given.json:
        rows = [
            {
                "provider": one.provider,
                "model": one.model,
                "key": one.key,
                "works": not one.problem,
                "seconds": round(one.seconds, 3),
                "problem": one.problem,
            }
            for one in tried
        ]
        print(json.dumps({"tried": rows}, ensure_ascii=False))
        return
    for one in tried:
        key = f"key {one.key}  " if one.key else "no key  " if one.model else ""
        problem = as_typed(_unnamed(one), workspace)
        print(f"{one.provider}  {key}{problem or f'works ({one.model} answered in {one.seconds:.2f} s)'}")


def _unnamed(one: _Tried) -> str:
    """Return the problem without the provider's name in front: the line begins with that."""
    preset = presets().get(one.provider)
    for title in (one.provider, preset.title if preset else one.provider):
        if one.problem.startswith(f"{title} "):
            return one.problem.removeprefix(f"{title} ")
    return one.problem
