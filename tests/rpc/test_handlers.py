"""The rules for code that serves grpc.aio, kept by reading it: each was paid for with a leak or a hang."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import moltbot_server
import pytest
from google.protobuf import descriptor_pool
from moltbot_server.rpc import chat, inference, model, plugin, session
from moltbot_server.rpc.server import SERVICES

PACKAGE = Path(moltbot_server.__file__).parent
RPC = sorted((PACKAGE / "rpc").glob("*.py"))
SERVICERS = [
    chat.ChatService,
    session.SessionService,
    model.ModelService,
    inference.InferenceService,
    plugin.PluginService,
]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def unraised(source: ast.AST) -> list[int]:
    """Return the lines of handlers that catch a cancellation, or everything, and may not raise it again."""
    lines = []
    for node in ast.walk(source):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = "BaseException" if node.type is None else ast.unparse(node.type)
        if "CancelledError" in caught or "BaseException" in caught:
            last = node.body[-1]
            if not isinstance(last, ast.Raise):
                lines.append(node.lineno)
    return lines


def timed_steps(source: ast.AST) -> list[int]:
    """Return the lines where a single read or write of a stream is given a time limit: it breaks the stream."""
    lines = []
    for node in ast.walk(source):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("wait_for"):
            lines.append(node.lineno)
        if isinstance(node, ast.AsyncWith) and any("timeout" in ast.unparse(item) for item in node.items):
            for inner in node.body:
                step = inner.value if isinstance(inner, ast.Expr | ast.Assign) else None
                call = step.value if isinstance(step, ast.Await) else None
                name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
                if name.rpartition(".")[2] in ("read", "write", "anext", "__anext__"):
                    lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("servicer", SERVICERS, ids=lambda servicer: servicer.__name__)
def test_every_handler_is_a_coroutine_and_no_generator(servicer: type) -> None:
    service = next(name for name in SERVICES if name.endswith(f".{servicer.__name__}"))

    for method in descriptor_pool.Default().FindServiceByName(service).methods:
        handler = vars(servicer).get(method.name)
        assert handler is not None, f"{method.full_name} is not served"
        assert inspect.iscoroutinefunction(handler), method.full_name
        assert not inspect.isasyncgenfunction(handler), method.full_name


@pytest.mark.parametrize("path", RPC, ids=lambda path: path.name)
def test_a_cancellation_that_is_caught_is_raised_again(path: Path) -> None:
    assert unraised(parsed(path)) == []


@pytest.mark.parametrize("path", RPC, ids=lambda path: path.name)
def test_no_single_read_or_write_has_a_time_limit(path: Path) -> None:
    assert timed_steps(parsed(path)) == []


def test_only_rpc_and_what_stands_above_it_import_grpc() -> None:
    above = {"rpc", "cli", "bench", "testing", "testing.py", "app.py", "engine_role.py", "__main__.py"}
    importing = set()
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE).parts[0]
        for node in ast.walk(parsed(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if place not in above and any(name.split(".")[0] in ("grpc", "google", "moltbot") for name in names):
                importing.add(path.name)

    assert importing == set()


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (unraised, "try:\n    x()\nexcept asyncio.CancelledError:\n    pass"),
        (unraised, "try:\n    x()\nexcept (OSError, asyncio.CancelledError):\n    log()"),
        (unraised, "try:\n    x()\nexcept BaseException:\n    return 1"),
        (unraised, "try:\n    x()\nexcept:\n    pass"),
        (timed_steps, "async def f():\n    async with asyncio.timeout(1):\n        await context.write(x)"),
        (timed_steps, "async def f():\n    await asyncio.wait_for(call.read(), 1)"),
    ],
)
def test_a_rule_that_is_broken_is_noticed(rule: object, code: str) -> None:
    assert rule(ast.parse(code)) != []  # type: ignore[operator]
