"""The embedding engine: an encoder among the models, which turns texts into vectors and writes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moltbot_server.errors import Unimplemented
from moltbot_server.models.encoder import Encoder
from moltbot_server.models.encoder_folder import EncoderFolder
from moltbot_server.models.engine import NOBODY, Asker, Capabilities, Embedded, Generation, Listener
from moltbot_server.models.limits import check_options
from moltbot_server.turns import GenerationOptions, Message


class EmbeddingEngine:
    """An encoder's folder as an engine. Whatever would have it write is refused."""

    is_route = False
    is_free = True
    rest = 0.0

    def __init__(self, folder: EncoderFolder, *, threads: int = 1) -> None:
        """Describe the model; nothing is loaded before `start`. `threads` are those of one batch."""
        self._encoder = Encoder(folder, threads=threads)
        self.id = folder.id
        self.display_name = folder.display_name
        self.type = folder.family
        self.memory_bytes = self._encoder.memory_bytes
        self.parallel = self.overhead = 0
        self.capabilities = Capabilities(
            context_length=folder.context_length, streaming=False, generation=False, embeddings=True
        )

    @property
    def healthy(self) -> bool:
        """Whether the model is loaded."""
        return self._encoder.healthy

    @property
    def numbers(self) -> Mapping[str, float]:
        """Nothing is counted."""
        return {}

    async def start(self) -> None:
        """Load the model and let it embed once."""
        await self._encoder.start()

    async def close(self) -> None:
        """Free the model."""
        await self._encoder.close()

    async def embed(self, texts: Sequence[str]) -> Embedded:
        """Return the vector of each text; see `Engine.embed`."""
        return await self._encoder.embed(texts)

    def check(self, options: GenerationOptions) -> None:
        """Refuse: it writes nothing, whatever the options are."""
        check_options(options, self.capabilities)

    def count(self, message: Message) -> int:
        """Return the least that a message can take: what is too long is cut."""
        return 0

    async def tokens(self, content: str | Sequence[Message]) -> int:
        """Refuse: an encoder knows texts, no conversations."""
        raise Unimplemented(f"The model {self.id} embeds; `Embed` tells how many tokens its texts took.")

    def admit(self, asker: Asker) -> None:
        """Take everything: whoever wants an answer was refused before."""

    def begin(
        self, messages: Sequence[Message], options: GenerationOptions, listener: Listener, asker: Asker = NOBODY
    ) -> Generation:
        """Refuse: it writes nothing."""
        raise Unimplemented(f"The model {self.id} turns texts into vectors and writes no answers.")
