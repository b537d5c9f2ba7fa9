"""A caller's options in CTranslate2's terms, so that none of them is silently ignored."""

from __future__ import annotations

from moltbot_server.models.engines.local.rows import Sampling
from moltbot_server.turns import GenerationOptions

_COLDEST = 1e-3


def sampling_of(options: GenerationOptions, vocabulary: int) -> Sampling:
    """Return how tokens are chosen from a vocabulary of so many.

    CTranslate2 takes the likeliest token, whatever the temperature is, unless `sampling_topk` is other than its default
    of 1; 0 means all tokens, and more than there are is refused. At temperature 0 nothing else matters; one that is so
    small that dividing by it leaves the numbers of the model is as good as 0.
    """
    penalty = options.repetition_penalty or 1.0
    topk = options.top_k or 0
    if (options.temperature or 0.0) < _COLDEST or topk == 1:
        return Sampling(repetition_penalty=penalty)
    return Sampling(
        topk=0 if topk >= vocabulary else topk,
        topp=options.top_p or 1.0,
        temperature=options.temperature or 0.0,
        repetition_penalty=penalty,
    )
