"""What the tests of whole systems borrow from those of the core: a Redis of their own."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "core"))
