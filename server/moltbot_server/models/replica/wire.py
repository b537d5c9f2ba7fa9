"""What passes between an engine and the processes that write for it, through sockets of one machine and one user."""

from __future__ import annotations

import struct
from typing import Final

ASK = struct.Struct("<ii")
"""What is asked of a nursery, and of which process: `FORK`, with a socket and shared memory beside it, or `END`."""

ANSWER = struct.Struct("<i")
"""What it answers: the new process, the status with which one ended, or the number of an error below zero."""

FORK, END = 1, 2
REFUSED = -10_000
"""Below it an answer is an error's number less this: a status may be below zero too."""

SIZE = struct.Struct("<I")
"""Goes before each message to a replica: how many bytes of `marshal` follow.

The first message is how to load the model: path, threads, number type, ids of the tokens that end an answer, how many
seconds of steps are told at once, and a prompt to wake the model up with.

Each further one is a batch: its number, the prompts, how many tokens each may have, the beginning that all share and
the model keeps, and the sampling: top k, top p, temperature, repetition penalty.
"""

FRAME = struct.Struct("<iid")
"""Goes before what a replica tells: what it is, how many bytes follow, and when the last of it was written.

`LOADED` says all by itself, `TOKENS` are pairs of 32-bit numbers, a row of the batch and a token, `DONE` says `BEGAN`,
and `FAILED` is a text.
"""

BEGAN = struct.Struct("<d")
"""When a batch was begun. Times are those of `perf_counter`, which is one clock for all processes of a machine."""

LOADED, TOKENS, DONE, FAILED = range(4)

CELLS = 256
"""Rows of a batch at most. The shared memory has a 32-bit number for each: of the batch in which the row is to end."""
CELL: Final = "I"
CELL_BYTES = 4
