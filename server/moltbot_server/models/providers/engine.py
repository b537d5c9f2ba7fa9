"""A remote model as an engine: asked over HTTP with one of several keys, its answer told as it streams in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from time import monotonic
from urllib.parse import urlsplit

import msgspec

from moltbot_server.config_models import Price, Provider, ProviderModel
from moltbot_server.errors import (
    InvalidField,
    ModelCredential,
    ModelUnavailable,
    MoltBotError,
    QueueFull,
    UnsupportedOption,
)
from moltbot_server.models.caching.metadata import MetadataCache
from moltbot_server.models.engine import (
    NOBODY,
    Asker,
    Capabilities,
    Embedded,
    Generation,
    Listener,
    counted,
    no_embeddings,
)
from moltbot_server.models.limits import check_options
from moltbot_server.models.providers.answer import ProviderAnswer
from moltbot_server.models.providers.calls import DIALECTS, Heads
from moltbot_server.models.providers.contents import estimate
from moltbot_server.models.providers.cooldowns import Cause, Cooldowns, Place
from moltbot_server.models.providers.keys import KeyRing, NoKeys, ProviderKey
from moltbot_server.models.providers.listing import NotTold, context_lengths
from moltbot_server.models.providers.pool import Origin, Pool
from moltbot_server.models.providers.pools import Pools
from moltbot_server.models.providers.presets import Terms, terms
from moltbot_server.models.providers.wellness import Wellness
from moltbot_server.turns import GenerationOptions, Message, ToolMode

log = logging.getLogger(__name__)

_LOOK_AGAIN = 60.0  # seconds until a provider is asked again what it lists; what it listed is kept for longer
_KEYLESS = (ProviderKey(id="", text=""),)
_OPTIONS = ("max_output_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")


class ProviderEngine:
    """One model of one provider.

    It never waits for a key: one that rests is passed over, and when all rest it refuses with the time to come back.
    """

    memory_bytes = parallel = overhead = 0
    is_route = False
    is_free = False

    def __init__(
        self,
        provider: Provider,
        model: ProviderModel,
        *,
        keys: KeyRing | None = None,
        cooldowns: Cooldowns | None = None,
        pools: Pools | None = None,
        metadata: MetadataCache | None = None,
    ) -> None:
        """`cooldowns`, `pools` and `metadata` are shared by all engines: what they know outlives a new configuration.

        With `metadata` the provider is asked how much a model reads of which that is not known, beside its first turn.

        Raises:
            InvalidConfiguration: the model cannot be asked as the configuration has it.
        """
        self.terms: Terms = terms(provider, model)
        self.id = model.name
        self.display_name = f"{self.terms.id} ({self.terms.title})"
        self.type = provider.name
        self.capabilities = _capabilities(self.terms)
        self.provider = provider
        self.dialect = DIALECTS[self.terms.dialect]
        self.cooldowns = Cooldowns() if cooldowns is None else cooldowns  # an empty one is false
        self._ring: KeyRing = NoKeys() if keys is None else keys
        self._pools = Pools() if pools is None else pools
        self._origin = Origin.of(urlsplit(self.terms.url))
        self._pool: Pool | None = None
        self._turn = 0
        self.whole = Place(self.terms.provider, self.terms.id)
        self._answers: set[ProviderAnswer] = set()
        self._wellness = Wellness(provider=provider.name, model=model.name)
        self._heads = Heads(self.terms)
        self._metadata = metadata if not self.terms.context_known and self._heads.has_list else None
        self._look_at = 0.0
        self._look: asyncio.Task[None] | None = None

    @property
    def price(self) -> Price | None:
        """What it costs, as the configuration or the preset has it; None when that is not known."""
        return self.terms.price

    @property
    def healthy(self) -> bool:
        """Whether it is started and has a key, or needs none."""
        return self._pool is not None and bool(self._keys())

    @property
    def rest(self) -> float:
        """Seconds until one of its keys may be used again."""
        if self.cooldowns.is_quiet:
            return 0.0
        whole = self.cooldowns.rest(self.whole)
        keys = self._keys()
        return max(whole, min((self.cooldowns.rest(self.place(key)) for key in keys), default=0.0))

    @property
    def locked_out(self) -> MoltBotError | None:
        """Why it answers nobody although it has keys: each of them is refused; see `NeedsKeys`."""
        keys = self._keys()
        places = [self.place(key) for key in keys]
        if not keys or not all(
            self.cooldowns.rest(place) and self.cooldowns.cause(place) is Cause.CREDENTIAL for place in places
        ):
            return None
        if keys is _KEYLESS:
            return self.keyless()
        refused = f"{self.terms.title} refused each key that it was given for {self.id}"
        return ModelCredential(f"{refused}; {self._way_to_a_key}")

    @property
    def numbers(self) -> Mapping[str, float]:
        """Answers under way, its keys, and how many of them rest."""
        keys = self._keys()
        resting = sum(self.cooldowns.rest(self.place(key)) > 0 for key in keys)
        return {"answers": len(self._answers), "keys": sum(bool(key.text) for key in keys), "keys_resting": resting}

    async def start(self) -> None:
        """Become ready. The provider is not asked: a provider that is away must not keep a core from starting."""
        if self._pool is None:
            self._pool = self._pools.lend(self._origin)

    async def close(self) -> None:
        """End the answers under way, and let the connections go."""
        if self._look is not None:
            self._look.cancel()
        if self._pool is None:
            return
        self._pool = None
        for answer in tuple(self._answers):
            answer.fail(ModelUnavailable(f"The model {self.id} was taken away while it answered."))
        self._pools.give_back(self._origin)

    def check(self, options: GenerationOptions) -> None:
        """Refuse options that are out of range, or that the provider would ignore."""
        check_options(options, self.capabilities)
        known = self.terms
        for name in _OPTIONS:
            if getattr(options, name) is not None and not known.takes(name):
                raise UnsupportedOption(f"options.{name}", f"{known.title} does not honour it; leave it out")
        if options.temperature is not None and options.temperature > known.max_temperature:
            raise InvalidField("options.temperature", f"{known.title} takes at most {known.max_temperature:g}")
        if len(options.stop) > known.max_stops:
            raise InvalidField("options.stop", f"{known.title} takes at most {known.max_stops}")
        choice = options.tool_choice
        if choice is not None and not known.forced_tools and (choice.tool or choice.mode is ToolMode.REQUIRED):
            raise UnsupportedOption("options.tool_choice", "this model chooses for itself whether it calls a tool")

    def count(self, message: Message) -> int:
        """Return about how many tokens a message takes, rather too many than too few."""
        return estimate(message)

    async def tokens(self, content: str | Sequence[Message]) -> int:
        """Return about how many tokens a text or a conversation takes: what it really is, only the provider knows."""
        return counted(self, content)

    async def embed(self, texts: Sequence[str]) -> Embedded:
        """Refuse: it is asked for answers alone."""
        raise no_embeddings(self)

    def admit(self, asker: Asker) -> None:
        """Refuse while it has no key, or none that may be used now."""
        if self._pool is None:
            raise ModelUnavailable(f"The model {self.id} is not started.")
        keys = self._keys()
        if not keys:
            raise ModelCredential(f"{self.terms.title} needs a key; {self._way_to_a_key}")
        if self.cooldowns.is_quiet:
            return
        if (rest := self.cooldowns.rest(self.whole)) > 0:
            text = f"{self.terms.title} said that it is down."
            raise ModelUnavailable(text, retry_after=rest)
        places = [self.place(key) for key in keys]
        if any(not self.cooldowns.rest(place) for place in places):
            return
        if (refusal := self.locked_out) is not None:
            raise refusal
        text = f"{self.terms.title} takes no more requests for {self.id} now."
        raise QueueFull(text, retry_after=self.rest)

    def begin(
        self, messages: Sequence[Message], options: GenerationOptions, listener: Listener, asker: Asker = NOBODY
    ) -> Generation:
        """Ask for an answer; see `Engine.begin`.

        Raises:
            ModelCredential: it has no key.
            QueueFull: each of its keys rests.
            ModelUnavailable: it is not started, or the provider said that it is down.
            UnsupportedContent: a picture lies where the provider cannot fetch it.
        """
        self.admit(asker)
        body = self.dialect.request(self.terms, messages, options)
        key = self.next_key(())
        if key is None:  # `admit` has found one
            raise QueueFull(f"{self.terms.title} takes no more requests for {self.id} now.", retry_after=self.rest)
        answer = ProviderAnswer(self, key, body, options, listener)
        self._answers.add(answer)
        answer.begin()
        if self._metadata is not None and self._look is None and monotonic() >= self._look_at:
            self._look = asyncio.create_task(self._learn(self._metadata, key))
        return answer

    async def _learn(self, metadata: MetadataCache, key: ProviderKey) -> None:
        """Take on what the provider says of how much the model reads; where it says nothing, ask again later."""
        terms = self.terms
        place = f"models of {terms.provider} at {terms.url}"
        self._look_at = monotonic() + _LOOK_AGAIN
        try:
            told = await metadata.get(place, None, lambda: context_lengths(self.pool, self._heads.look(key)))
        except (NotTold, ModelUnavailable) as problem:
            why = {"provider": terms.provider, "problem": str(problem)}
            log.debug("a provider does not list its models", extra=why)
        else:
            reads = told.get(terms.id, 0)
            if reads and reads != self.capabilities.context_length:
                self.capabilities = msgspec.structs.replace(self.capabilities, context_length=reads)
                log.info("a provider tells how much a model reads", extra={"model": self.id, "tokens": reads})
        finally:
            self._look = None

    def keyless(self) -> ModelCredential:
        """Return the refusal of a provider that was given no key and wants one."""
        return ModelCredential(f"{self.terms.title} wants a key; {self._way_to_a_key}")

    # --- what an answer asks for -------------------------------------------------------------------------------------

    @property
    def pool(self) -> Pool:
        """Where connections come from."""
        if self._pool is None:
            raise ModelUnavailable(f"The model {self.id} is not started.")
        return self._pool

    def place(self, key: ProviderKey) -> Place:
        """Return what rests when a key is refused."""
        return Place(self.terms.provider, self.terms.id, key.id or "-")

    def next_key(self, tried: Sequence[str]) -> ProviderKey | None:
        """Return a key that may be used now and is not among those tried, all in turn; None when there is none."""
        keys = self._keys()
        quiet = self.cooldowns.is_quiet
        for step in range(len(keys)):
            key = keys[(self._turn + step) % len(keys)]
            if key.id not in tried and (quiet or not self.cooldowns.rest(self.place(key))):
                self._turn = (self._turn + step + 1) % len(keys)
                return key
        return None

    def head(self, key: ProviderKey, length: int) -> bytes:
        """Return the head of a request."""
        return self._heads.head(key, length)

    def keys(self) -> list[str]:
        """Return the keys of the provider."""
        return [key.text for key in self._keys()]

    def secrets(self) -> list[str]:
        """Return everything that must not be told."""
        return [*self.keys(), *(value for _, value in self.terms.headers)]

    def worked(self, key: ProviderKey) -> None:
        """Take note that the model speaks to whoever has this key."""
        self.cooldowns.worked(self.place(key))
        self._wellness.worked()

    def failed(self, error: MoltBotError, problem: str) -> None:
        """Take note of the error that an answer ended with; `problem` is what the log may have of it."""
        # One of the caller's own says nothing of the model, and one that is taken away is not ill.
        if self._pool is not None and isinstance(error, ModelUnavailable | ModelCredential):
            self._wellness.failed(problem)

    def over(self, answer: ProviderAnswer) -> None:
        """Let an answer go."""
        self._answers.discard(answer)

    @property
    def _way_to_a_key(self) -> str:
        # Callers of any kind read this: the folder of the workspace is named where the command line prints it.
        return f"add one to the workspace of this MoltBot with `moltbot key add {self.type}`."

    def _keys(self) -> Sequence[ProviderKey]:
        return self._ring.keys(self.terms.provider) or (() if self.terms.needs_key else _KEYLESS)


def _capabilities(known: Terms) -> Capabilities:
    return Capabilities(
        context_length=known.context_length,
        sampling=any(known.takes(name) for name in ("temperature", "top_p", "top_k")),
        stop=known.takes("stop"),
        seed=known.takes("seed"),
        repetition_penalty=known.takes("repetition_penalty"),
        image_input=known.vision,
        tools=known.tools,
        cancellation=True,
    )
