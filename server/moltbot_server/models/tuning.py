"""How a model uses the processors: replicas, threads, batches and number type, as measured on this machine."""

from __future__ import annotations

from moltbot_server.turns import Value

COMPUTE_TYPES = (
    "default",
    "auto",
    "int8",
    "int8_float32",
    "int8_float16",
    "int8_bfloat16",
    "int16",
    "float16",
    "bfloat16",
    "float32",
)
"""What CTranslate2 may compute in; `default` is the type that the weights were saved in."""

MOST_REPLICAS = 64
MOST_THREADS = 256
MOST_ROWS = 256


class Tuning(Value, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model uses the machine.

    `replicas` write a batch each at the same time and share the weights, each computes on `threads` processors, and
    `batch` is the most rows of a batch. `compute_type` is one of `COMPUTE_TYPES`.

    Raises:
        ValueError: a number is out of its bounds, or there is no such type.
    """

    replicas: int = 1
    threads: int = 1
    batch: int = 8
    compute_type: str = "default"

    def __post_init__(self) -> None:
        for name, most in (("replicas", MOST_REPLICAS), ("threads", MOST_THREADS), ("batch", MOST_ROWS)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 to {most}")
        if self.compute_type not in COMPUTE_TYPES:
            raise ValueError(f"compute_type is {self.compute_type!r}; expected one of {', '.join(COMPUTE_TYPES)}")

    @property
    def processors(self) -> int:
        """How many processors the model keeps busy at most."""
        return self.replicas * self.threads


def default_tuning(cpus: int) -> Tuning:
    """Return what fits a machine of so many usable processors where nothing was measured.

    Measured with the built-in model and 16 streams, tokens/s and median first token, medians of five runs on a busy
    machine: on 2 processors 1 replica 8,700 and 51 ms, 2 replicas 9,400 and 19 ms; on 4 processors 2 replicas 12,700
    and 13 ms, 3 replicas 10,200 and 13 ms, 4 replicas 10,500 and 12 ms. So half of the processors stay with the event
    loop, which must read every token, and with whatever else runs; but two processors have two replicas.
    """
    return Tuning(replicas=min(4, max(cpus // 2, min(cpus, 2))))
