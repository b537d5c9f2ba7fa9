"""Who serves a model: out of a name such as `gpt-4o`, `opus-4.5` or `openrouter/qwen/qwen3-max`."""

from __future__ import annotations

from collections.abc import Sequence

from moltbot_server.config_models import Provider, ProviderModel
from moltbot_server.config_spelling import nearest
from moltbot_server.errors import ModelNotFound
from moltbot_server.models.providers.presets import named, preset_of, presets, renamed


def resolve(name: str, providers: Sequence[Provider]) -> tuple[Provider, ProviderModel]:
    """Return the provider that serves a model, and the model, whose `name` is the one that was asked for.

    A model that the configuration lists goes first, then `provider/model`, then a name that a preset knows: the first
    configured provider with that preset, or the preset itself.

    Raises:
        ModelNotFound: nobody is known to serve it.
        InvalidConfiguration: a provider names a preset that is not there.
    """
    for provider in providers:
        if (listed := _listed(provider, name)) is not None:
            return provider, listed
    first, slash, rest = name.partition("/")
    if slash and rest:
        owner = next((each for each in providers if each.name == first), None) or named(first)
        if owner is not None:
            return owner, renamed(_listed(owner, rest) or ProviderModel(name=rest), name)
    for provider in providers:
        preset = preset_of(provider)
        if preset is not None and preset.serves(name):
            return provider, ProviderModel(name=name)
    for known, preset in presets().items():
        if preset.serves(name) and not any(each.name == known for each in providers):
            return Provider(name=known, preset=known), ProviderModel(name=name)
    meant = _meant(name, providers)
    hint = f"did you mean {meant[:128]!r}? Otherwise " if meant else ""
    raise ModelNotFound(
        f"No provider is known to serve {name[:128]!r}; {hint}write `provider/model`, or list it among its models."
    )


def _meant(name: str, providers: Sequence[Provider]) -> str:
    """Return the name that was probably meant: that of a model that is listed, or one with a provider that is known."""
    first, slash, rest = name.partition("/")
    if slash and rest:
        near = nearest(first, [*(provider.name for provider in providers), *presets()])
        return f"{near}/{rest}" if near else ""
    return nearest(name, [model.name for provider in providers for model in provider.models])


def _listed(provider: Provider, name: str) -> ProviderModel | None:
    return next((model for model in provider.models if model.name == name), None)
