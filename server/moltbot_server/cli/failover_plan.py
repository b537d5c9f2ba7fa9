"""What `moltbot failover test` is to try: a route as it is configured, with its providers moved to this machine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from moltbot_server.cli.terminal import Exit, Failure
from moltbot_server.config import Settings
from moltbot_server.config_models import ModelRoute, Provider, ProviderModel
from moltbot_server.errors import MoltBotError
from moltbot_server.models.plan_check import LOCAL
from moltbot_server.models.providers import presets, resolve

_LATENCY, _AFTER_LATENCY, _COOLDOWN = 3.0, 1.0, 5.0
"""The longest times of a route, in seconds, that a drill waits for; longer ones are cut to these."""

_SAMPLE = ModelRoute(primary="sample-first", fallback=("sample-second",))
_SAMPLE_DIALECTS = {"sample-first": "openai", "sample-second": "anthropic"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model of the route by the name that the route has for it; without a provider it is a local one."""

    name: str
    provider: Provider | None = None
    model: ProviderModel | None = None

    @property
    def text(self) -> str:
        """What its stand-in answers: a text of its own, so that it is seen who spoke."""
        return (
            f"This is {self.name}. 你好! 一切正常。 It says a few words more, so that there is something to break. 🙂"
        )

    def moved(self, number: int, address: str) -> Provider:
        """Return its provider at another address, as the provider of this model alone."""
        assert self.provider is not None
        assert self.model is not None
        own = self.provider
        return Provider(
            name=drill_name(number),
            preset=own.preset or (own.name if own.name in presets() else ""),
            dialect=own.dialect,
            base_url=f"{address}/v1",
            models=(replace(self.model, name=self.name, id=self.model.id or self.model.name),),
            api_version=own.api_version,
            connect_timeout=own.connect_timeout,
            idle_timeout=own.idle_timeout,
            answer_timeout=own.answer_timeout,
        )


def drill_name(number: int) -> str:
    """Return the name of a provider of the drill."""
    return f"drill-{number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drill:
    """A route to try; `notes` tells in a sentence each what is not as configured."""

    title: str
    route: ModelRoute
    candidates: tuple[Candidate, ...]
    is_sample: bool = False
    notes: tuple[str, ...] = ()


def plan(settings: Settings, route: str, local: Collection[str]) -> Drill:
    """Return the drill of a route of a configuration, by name or the default one; `local` are models of its own.

    Raises:
        Failure: there is no such route, or it leads nowhere.
    """
    spec = _chosen(settings, route)
    if spec is None:
        providers = [
            Provider(name=name, dialect="anthropic" if dialect == "anthropic" else "openai",
                     models=(ProviderModel(name=name),))
            for name, dialect in _SAMPLE_DIALECTS.items()
        ]  # fmt: skip
        candidates = _candidates(_SAMPLE, providers, ())
        note = "No route is configured: this is a sample of two models, with the thresholds of the defaults."
        return _bounded(Drill(title="a sample route", route=_SAMPLE, candidates=candidates, is_sample=True), (note,))
    title = f"the route {spec.name}" if spec.name else "the route of `models:`"
    found = Drill(title=title, route=spec, candidates=_candidates(spec, settings.providers, local))
    return _bounded(found, ())


def _chosen(settings: Settings, name: str) -> ModelRoute | None:
    known = {route.name: route for route in settings.routes}
    if name in ("", "default") and settings.models.primary:
        return settings.models
    if name in known:
        return known[name]
    if not name and len(known) == 1:
        return next(iter(known.values()))
    names = ", ".join(sorted(known))
    if name:
        default = "there is the default one alone" if settings.models.primary else "no route is configured"
        there = f"the routes are {names}" if names else default
        raise Failure(f"there is no route {name[:64]!r}; {there}", Exit.USAGE)
    if names:
        raise Failure(f"there is no default route; choose one with --route: {names}", Exit.USAGE)
    return None


def _candidates(spec: ModelRoute, providers: Sequence[Provider], local: Collection[str]) -> tuple[Candidate, ...]:
    found, problems = [], []
    for name in (spec.primary, *spec.fallback):
        if name in LOCAL or name in local:
            found.append(Candidate(name=name))
            continue
        try:
            provider, model = resolve(name, providers)
        except MoltBotError as problem:
            problems.append(problem.message)
        else:
            found.append(Candidate(name=name, provider=provider, model=model))
    if problems:
        raise Failure("\n".join(problems), Exit.CONFIG)
    return tuple(found)


def _bounded(drill: Drill, notes: Sequence[str]) -> Drill:
    """Return a drill whose times are short enough to wait for, with a note for each that was cut."""
    spec = drill.route
    latency = min(spec.latency, _LATENCY)
    timeout, cooldown = min(spec.timeout, latency + _AFTER_LATENCY), min(spec.cooldown, _COOLDOWN)
    told = list(notes)
    times = {"latency": latency, "timeout": timeout, "cooldown": cooldown}
    if cut := [f"{name} {seconds:g} s" for name, seconds in times.items() if seconds < getattr(spec, name)]:
        told.append(f"So that it does not take long: {', '.join(cut)}.")
    if spec.weights:
        told.append("Weights are left out: the models are asked in the order in which they are written.")
    if any(candidate.provider is None for candidate in drill.candidates):
        told.append("A scripted model stands in for each local one.")
    if len(drill.candidates) == 1:
        told.append("The route has one model only: nobody can stand in for it.")
    route = replace(spec, weights=(), latency=latency, timeout=timeout, cooldown=cooldown)
    return replace(drill, route=route, notes=tuple(told))
