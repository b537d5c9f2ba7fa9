"""The look at what streams leave behind, short."""

from __future__ import annotations

import json
import subprocess
import sys

import broken_streams
import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the count of memory in use is glibc's")
def test_each_kind_of_stream_is_made_at_each_server_and_its_memory_told() -> None:
    command = [sys.executable, broken_streams.__file__, "--streams", "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(each["server"], each["kind"]) for each in told] == [
        (server, kind) for server in ("bare", "core") for kind in ("whole", "broken off")
    ]
    assert all(each["streams"] == 40 and set(each["grown"]) == {"native", "resident"} for each in told)
