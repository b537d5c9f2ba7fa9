"""What the tests of whole systems borrow from others: a Redis of their own, and nodes that can be killed."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / name) for name in ("core", "faults")]
