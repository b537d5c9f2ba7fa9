"""What the models are asked in a benchmark: random words of an exact number of tokens, or real questions."""

from __future__ import annotations

import random
from collections.abc import Callable

from moltbot_server.bench.random_model import OPENING, STANDARD, words
from moltbot_server.turns import Message, Role, TextPart, Value

QUESTIONS = (
    "hello",
    "你好",
    "what can you do?",
    "你能做什么?",
    "how do I add a model?",
    "怎么添加模型?",
    "讲个笑话",
    "tell me a joke",
    "怎么接入钉钉?",
    "how do I connect Slack?",
    "what is 7 times 8?",
    "which ports does MoltBot use?",
    "怎么修改端口?",
    "where are my conversations kept?",
    "who made you?",
    "thank you",
)

Ask = Callable[[], tuple[str, int]]
"""Returns the next text to ask and the most tokens of its answer, 0 for no limit."""


class Workload(Value, frozen=True, kw_only=True):
    """What is asked: prompts of `shortest` to `longest` tokens, with `new` in answer; or questions, with neither.

    `vocabulary` is that of the random model that is asked.
    """

    shortest: int = 0
    longest: int = 0
    new: int = 0
    vocabulary: int = STANDARD.vocabulary

    def asking(self, seed: int) -> Ask:
        """Return what asks one text after another; of one seed, always the same."""
        chance = random.Random(seed)
        if not self.longest:
            return lambda: (chance.choice(QUESTIONS), 0)
        spoken = words(self.vocabulary)

        def ask() -> tuple[str, int]:
            count = chance.randint(self.shortest, self.longest) - OPENING
            return " ".join(chance.choices(spoken, k=count)), self.new

        return ask


def message(text: str) -> Message:
    """Return a text as what a user says."""
    return Message(role=Role.USER, parts=(TextPart(text=text),))
