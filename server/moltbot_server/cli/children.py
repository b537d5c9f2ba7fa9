"""One process of `moltbot start`: started in a group of its own, tied to the supervisor's life, started again."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from moltbot_server.cli.pulse import PATIENCE
from moltbot_server.config_keys import SECRET_NAMES, is_provider_key

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0
HEALTHY_AFTER = 60.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run: `python -m module arguments`. Those of a lower `stage` are stopped first.

    `pause` is how long to wait, in seconds, before one that died is started again; it doubles each time. `environ` are
    variables that it is given unless our own environment has them. `secrets` tells whether it is given those of our
    environment that hold keys of providers, or open them: what faces the network has no business with them. `tells`:
    MoltBot is not ready before this process has said so, in a line on its standard output. `patience`: how many looks
    it may owe an answer to whoever asks how it does, see `pulse`.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    stage: int = 0
    pause: float = FIRST_PAUSE
    longest_pause: float = LONGEST_PAUSE
    environ: Mapping[str, str] = field(default_factory=dict)
    secrets: bool = False
    tells: bool = False
    patience: int = PATIENCE


@dataclass(slots=True, kw_only=True)
class Child:
    """A process by its plan. Times are monotonic seconds; `due` is when it is to be started again."""

    plan: Plan
    process: subprocess.Popen[bytes] | None = None
    since: float = 0.0
    due: float | None = None
    pause: float = 0.0

    @property
    def pid(self) -> int:
        """The process id, 0 when it does not run."""
        return self.process.pid if self.process else 0

    def start(self, now: float) -> None:
        """Start the process. Its standard output is a pipe to us; its log goes where ours goes."""
        self.since, self.due = now, None
        self.process = subprocess.Popen(
            _command(self.plan.module, self.plan.arguments),
            env={**self.plan.environ, **_inherited(secrets=self.plan.secrets)},
            # Where the kernel cannot tie a child to our life, the end of this pipe does.
            stdin=subprocess.DEVNULL if _TIED_BY_KERNEL else subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # a selector sees what the kernel holds, not what a buffer of ours does
            # Ctrl-C goes to the terminal's foreground group, which is us alone: we stop the children in order.
            process_group=0,
            preexec_fn=_tie if _TIED_BY_KERNEL else None,
        )

    def ended(self, now: float) -> int | None:
        """Return the exit status when the process has just ended (and forget it), else None. Sets `due`."""
        if self.process is None or (status := self.process.poll()) is None:
            return None
        for pipe in (self.process.stdout, self.process.stdin):
            if pipe:
                pipe.close()
        self.process = None
        if now - self.since >= HEALTHY_AFTER:
            self.pause = 0.0
        self.pause = min(self.pause * 2, self.plan.longest_pause) or self.plan.pause
        self.due = now + self.pause
        return status

    def send(self, number: signal.Signals) -> None:
        """Send a signal if the process runs."""
        if self.process is not None:
            self.process.send_signal(number)


def _inherited(*, secrets: bool) -> Mapping[str, str]:
    if secrets:
        return os.environ
    return {name: text for name, text in os.environ.items() if name not in SECRET_NAMES and not is_provider_key(name)}


def status_in_words(status: int) -> str:
    """Return an exit status as people read it."""
    if status >= 0:
        return f"ended with status {status}"
    return f"was killed by {signal.Signals(-status).name}"


def _parent_death_signal() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def tie(number: int) -> int:
        return int(prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0))

    return tie


_prctl = _parent_death_signal()
_TIED_BY_KERNEL = _prctl is not None
_SUPERVISOR = os.getpid()


def _tie() -> None:
    """Runs in the child before its program: when the supervisor dies, the kernel asks the child to leave."""
    assert _prctl is not None
    _prctl(signal.SIGTERM)
    if os.getppid() != _SUPERVISOR:  # it died before the kernel knew
        os._exit(1)


def _command(module: str, arguments: Sequence[str]) -> list[str]:
    if _TIED_BY_KERNEL:
        return [sys.executable, "-m", module, *arguments]
    return [sys.executable, "-m", "moltbot_server.cli.tied", module, *arguments]
