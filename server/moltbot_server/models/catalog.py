"""The models of this core: which there are, where each stands, and which one answers when a turn names none."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum

from moltbot_server.errors import ModelInUse, ModelNotFound, ModelUnavailable, MoltBotError
from moltbot_server.models.engine import NOBODY, Engine, NeedsKeys

_log = logging.getLogger(__name__)


class ModelState(StrEnum):
    """Where a model stands."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class CatalogEntry:
    """One model of a catalog: its engine, how it is, and how many turns it has still to answer."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.load_time = 0.0
        self._state = ModelState.LOADING
        self._message = "The model is being loaded."
        self._turns = 0
        self._idle: asyncio.Event | None = None

    @property
    def state(self) -> ModelState:
        """Where the model stands now; a model whose threads have died has failed."""
        if self._state is ModelState.READY and not self.engine.healthy:
            return ModelState.FAILED
        return self._state

    @property
    def message(self) -> str:
        """Why the model is not ready; empty when it is."""
        if self.stopped:
            problem = self._problem()
            return problem.message if problem else "The model stopped working; the log says why."
        return self._message

    @property
    def reason(self) -> str:
        """What the engine's own refusal is called, such as `MODEL_CREDENTIAL`; empty when there is none."""
        problem = self._problem() if self.stopped else None
        return problem.reason if problem else ""

    @property
    def locked_out(self) -> MoltBotError | None:
        """What a model says that is ready and has keys of which its provider takes none; None where that is not so."""
        if self.state is not ModelState.READY or not isinstance(self.engine, NeedsKeys):
            return None
        return self.engine.locked_out

    @property
    def stopped(self) -> bool:
        """Whether the model was ready and cannot answer any more."""
        return self._state is ModelState.READY and not self.engine.healthy

    def _problem(self) -> MoltBotError | None:
        """Return what the engine itself says of why it takes no turns, if that is more than that it does not."""
        try:
            self.engine.admit(NOBODY)
        except ModelUnavailable:
            return None
        except MoltBotError as problem:
            return problem
        return None

    def refuse(self) -> MoltBotError:
        """Return the refusal of a turn by a model that is not ready."""
        if self.stopped and (problem := self._problem()) is not None:
            return problem
        return ModelUnavailable(
            f"The model {self.engine.id} cannot answer: {self.message}",
            retry_after=1.0 if self.state is ModelState.LOADING else None,
        )

    @property
    def turns(self) -> int:
        """How many turns it answers or will answer."""
        return self._turns

    async def start(self) -> None:
        """Load the model and remember how that went; `load_time` is in Unix seconds."""
        try:
            await self.engine.start()
        except MoltBotError as problem:
            self._state, self._message = ModelState.FAILED, problem.message
            raise
        self.loaded()

    def loaded(self) -> None:
        """Take note that the engine answers."""
        self._state, self._message, self.load_time = ModelState.READY, "", time.time()

    def hold(self) -> Engine:
        """Keep the model until `release`, for one turn, and return its engine."""
        self._turns += 1
        return self.engine

    def release(self) -> None:
        """Let go what `hold` kept."""
        self._turns -= 1
        if not self._turns and self._idle is not None:
            self._idle.set()

    async def drain(self) -> None:
        """Take no more turns, and return when the last one was let go."""
        self._state, self._message = ModelState.DRAINING, "The model ends its last turns."
        if self._turns:
            self._idle = self._idle or asyncio.Event()  # several may wait for it
            await self._idle.wait()


class Catalog:
    """The engines of a core by id. The first one is the default, until another is chosen."""

    def __init__(
        self,
        engines: Sequence[Engine] = (),
        *,
        advise: Callable[[ModelUnavailable], ModelUnavailable] = lambda problem: problem,
    ) -> None:
        """Take engines that are not started yet; those that answer already are added later.

        `advise` returns what is told, out of what is wrong, when the first one cannot be loaded.

        Raises:
            ValueError: two engines have one id.
        """
        self._advise = advise
        self._entries = {engine.id: CatalogEntry(engine) for engine in engines}
        if len(self._entries) < len(engines):
            raise ValueError("each engine of a catalog needs an id of its own")
        self._default = engines[0].id if engines else ""
        self.aliases: Mapping[str, str] = {}
        """Other names of models, such as those that routes have for them."""

    @property
    def default(self) -> str:
        """The id of the model that answers when a turn names none."""
        return self._default

    def __contains__(self, model: str) -> bool:
        """Tell whether there is a model by this id."""
        return model in self._entries or self.aliases.get(model) in self._entries

    @property
    def entries(self) -> list[CatalogEntry]:
        """All models, the default one first."""
        return sorted(self._entries.values(), key=lambda entry: entry.engine.id != self._default)

    def entry(self, model: str) -> CatalogEntry:
        """Return a model by id; the empty id is the default one.

        Raises:
            ModelNotFound: no model has this id.
        """
        entry = self._entries.get(model or self._default) or self._entries.get(self.aliases.get(model, ""))
        if entry is None:
            raise ModelNotFound(f"There is no model {model[:64]!r}; available: {', '.join(self._entries) or 'none'}.")
        return entry

    def ready(self, model: str = "") -> CatalogEntry:
        """Return a model that can answer; the empty id is the default one.

        Raises:
            ModelNotFound: no model has this id.
            ModelUnavailable: the model is being loaded, ends its last turns, or has failed.
        """
        entry = self.entry(model)
        if entry.state is not ModelState.READY:
            raise entry.refuse()
        return entry

    def get(self, model: str = "") -> Engine:
        """Return the engine of a model that can answer; raises what `ready` does."""
        return self.ready(model).engine

    def add(self, engine: Engine) -> CatalogEntry:
        """Take in a model that answers already.

        Raises:
            ValueError: a model has its id.
        """
        if engine.id in self._entries:
            raise ValueError(f"there is a model {engine.id} already")
        entry = self._entries[engine.id] = CatalogEntry(engine)
        entry.loaded()
        self._default = self._default or engine.id
        return entry

    def choose(self, model: str) -> CatalogEntry:
        """Make a model the default, in one step; raises what `ready` does."""
        entry = self.ready(model)
        self._default = entry.engine.id
        return entry

    def prefer(self, model: str) -> None:
        """Make a model the default, whether it can answer now or not.

        Raises:
            ModelNotFound: no model has this id.
        """
        self._default = self.entry(model).engine.id

    async def drop(self, model: str) -> Engine:
        """Take a model out once its last turn has ended, and return its engine, which is still to be closed.

        Raises:
            ModelNotFound: no model has this id.
            ModelInUse: it is the default model.
        """
        entry = self.may_drop(model)
        await entry.drain()
        if self._entries.get(entry.engine.id) is entry:
            del self._entries[entry.engine.id]
        return entry.engine

    def may_drop(self, model: str) -> CatalogEntry:
        """Return a model that may be taken out; raises what `drop` does."""
        entry = self.entry(model)
        if entry.engine.id == self._default:
            raise ModelInUse(f"The model {entry.engine.id} answers by default; switch to another one first.")
        return entry

    def take_out(self, model: str) -> CatalogEntry:
        """Remove a model at once and return it; turns that hold it end with it, and it is still to be closed.

        Another one has to be chosen if it was the default.

        Raises:
            ModelNotFound: no model has this id.
        """
        entry = self.entry(model)
        return self._entries.pop(entry.engine.id)

    def numbers(self) -> Iterator[tuple[tuple[str, str], float]]:
        """Yield what is counted of each model: (its id, what), how many."""
        for entry in self.entries:
            counts = {"turns": entry.turns, "memory_bytes": entry.engine.memory_bytes, **entry.engine.numbers}
            yield from (((entry.engine.id, name), float(count)) for name, count in counts.items())

    async def start(self) -> None:
        """Load all models at once. One that fails is kept as failed, unless it is the default.

        Raises:
            ModelUnavailable: the default model cannot be loaded; what else was loaded is closed.
        """
        entries = self.entries
        results = await asyncio.gather(*(entry.start() for entry in entries), return_exceptions=True)
        problems = {entry: result for entry, result in zip(entries, results, strict=True) if result is not None}
        for entry, problem in problems.items():
            if entry is entries[0] or not isinstance(problem, MoltBotError):
                await self.close()
                raise self._advise(problem) if isinstance(problem, ModelUnavailable) else problem
            _log.error("a model cannot be loaded", extra={"model": entry.engine.id, "problem": problem.message})

    async def close(self) -> None:
        """Stop what runs and free all models."""
        await asyncio.gather(*(entry.engine.close() for entry in self._entries.values()))
