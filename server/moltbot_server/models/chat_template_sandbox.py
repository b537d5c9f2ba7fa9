"""Jinja templates of model folders: what Hugging Face gives them, in a sandbox with bounds.

A folder's template is a stranger's program. It reaches nothing but the messages; what it does is counted in steps, and
nothing that it makes, in the end or on the way, grows beyond a few times the conversation. The worst that was
thought of is refused within a tenth of a second and 10 MB.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn, cast

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moltbot_server.models.chat_template import Render, TemplateRefused

_LONGEST_SOURCE = 256 * 1024
_STEPS, _STEPS_A_MESSAGE = 20_000, 2_000
_CHARACTERS, _GROWTH = 200_000, 4
_CHARACTERS_A_STEP = 1000
_LONGEST_REPEAT = 4096
_PADDING = frozenset({"center", "expandtabs", "ljust", "rjust", "translate", "zfill"})
"""Methods of texts that make long ones of short ones; no chat template needs them."""
_FILTERS = frozenset(
    {
        *("capitalize", "dictsort", "e", "escape", "float", "int", "items", "list", "lower", "map", "reject"),
        *("rejectattr", "reverse", "select", "selectattr", "sort", "string", "title", "trim", "unique", "upper"),
    }
)
_LIGHT_FILTERS = frozenset({"count", "d", "default", "first", "last", "length", "safe"})
"""Those that cost the same whatever they are given."""
_COMPARING_TESTS = frozenset({"!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in"}) | {
    *("le", "lessthan", "lt", "ne"),
}


class _Budget:
    """What one run of a template may still do."""

    __slots__ = ("characters", "messages", "steps")

    def __init__(self, messages: Sequence[Mapping[str, str]]) -> None:
        self.messages = messages
        self.steps = _STEPS + _STEPS_A_MESSAGE * len(messages)
        self.characters = _CHARACTERS + _GROWTH * sum(len(message["content"]) for message in messages)

    def spend(self, characters: int = 0) -> None:
        """Count a step, and a text or list of this size that is read or made in it."""
        if characters > self.characters:
            raise SecurityError(f"it makes a text of more than {self.characters} characters")
        self.steps -= 1 + characters // _CHARACTERS_A_STEP
        if self.steps < 0:
            raise SecurityError("it runs for too long")

    def spend_on(self, value: Any) -> None:
        """Count all that a value holds, however deep; what stands in it twice counts twice.

        Not the list of messages, which templates hand around in their loops.
        """
        pending, characters = [value], 0
        while pending:
            item = pending.pop()
            if isinstance(item, str):
                characters += len(item)
            elif isinstance(item, dict):
                pending += [*item.keys(), *item.values()]
                self.spend(len(item))
            elif isinstance(item, list | tuple) and item is not self.messages:
                pending += item
                self.spend(len(item))
        self.spend(characters)


_budget: ContextVar[_Budget] = ContextVar("budget")


def compile_template(source: str, options: Mapping[str, Any]) -> Render:
    """Return a template that is ready to lay out conversations. `options` are further names that it may read.

    Raises:
        TemplateRefused: it is too long, or no Jinja, or uses what the sandbox does not give.
    """
    if len(source) > _LONGEST_SOURCE:
        raise TemplateRefused(f"it has {len(source)} characters; expected {_LONGEST_SOURCE} at most")
    try:
        template = _Sandbox().from_string(source)
    except (TemplateError, RecursionError) as problem:
        raise TemplateRefused(f"it cannot be read: {problem}") from None

    def render(messages: Sequence[Mapping[str, str]], *, opened: bool) -> str:
        budget = _Budget([dict(message) for message in messages])
        token = _budget.set(budget)
        names = {**options, "messages": budget.messages, "add_generation_prompt": opened}
        try:
            return _bounded_text(template.generate({"tools": None, "documents": None, **names}), budget)
        except Exception as problem:  # whatever a stranger's program runs into is its own fault
            raise TemplateRefused(str(problem) or type(problem).__name__) from None
        finally:
            _budget.reset(token)

    return render


def _bounded_text(pieces: Iterable[str], budget: _Budget) -> str:
    parts: list[str] = []
    size = 0
    for piece in pieces:
        parts.append(piece)
        size += len(piece)
        if size > budget.characters:
            budget.spend(size)
    return "".join(parts)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Counts what a template does: loops, calls, filters, and the texts and lists that it makes."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self) -> None:
        extensions = [_GenerationBlock, loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_weighed)
        heavy: dict[str, Callable[..., Any]] = {name: self.filters[name] for name in _FILTERS}
        heavy |= {"join": _join, "replace": _replaced, "tojson": _to_json}
        self.filters = {name: self.filters[name] for name in _LIGHT_FILTERS}
        self.filters |= {name: _counted(filter_) for name, filter_ in heavy.items()}
        self.filters |= {"rounds": _rounds, "concatenated": _concatenated, "weighed": _weighed, "sliced": _sliced}
        tests: dict[str, Any] = dict(self.tests)
        self.tests |= {name: _counted(tests[name]) for name in _COMPARING_TESTS}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.globals.pop("lipsum", None)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            if loop.recursive:
                raise SecurityError("it has a recursive loop")
            loop.iter = _filtered(loop.iter, "rounds")
        for both in tree.find_all(nodes.Concat):
            both.nodes = [_filtered(nodes.List(both.nodes, lineno=both.lineno), "concatenated")]
        for comparison in tree.find_all(nodes.Compare):
            comparison.expr = _filtered(comparison.expr, "weighed")
        for part in tree.find_all(nodes.Getitem):
            if isinstance(part.arg, nodes.Slice):
                part.node = _filtered(part.node, "sliced")
        tree.set_environment(self)
        return tree

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls; see the base class."""
        budget = _budget.get()
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            name = getattr(obj, "__name__", "")
            if name in ("replace", "join"):
                return _replaced(owner, *args) if name == "replace" else _join(args[0], owner)
            budget.spend(len(owner))
        budget.spend_on([args, kwargs])
        return super().call(context, obj, *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Tell whether a template may read an attribute; see the base class."""
        return not (isinstance(obj, str) and attr in _PADDING) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Refuse `str.format`, which pads without end."""
        if super().wrap_str_format(value) is not None:
            raise SecurityError("it uses the method format, which is not given here")
        return None

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Reckon; see the base class."""
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" or (operator == "%" and not numbers):
            raise SecurityError(f"it uses {operator}, which is not given here")
        if numbers and max(abs(left), abs(right)) > 1 << 53:
            raise SecurityError("it reckons with numbers that are too large")
        if not numbers and operator == "*":
            repeated, times = (left, right) if isinstance(right, int) else (right, left)
            if isinstance(times, int) and len(repeated) * times > _LONGEST_REPEAT:
                raise SecurityError("it repeats a text or a list too often")
        if not numbers:
            _budget.get().spend_on([left, right])
        return super().call_binop(context, operator, left, right)


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(cast(nodes.Expr, node), name, [], [], None, None, lineno=node.lineno)


def _counted(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that counts what it is given."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        _budget.get().spend_on([args, kwargs])
        return filter_(*args, **kwargs)

    # Jinja hands a filter its environment or context where this attribute of the function asks for it.
    if hasattr(filter_, "jinja_pass_arg"):
        counted.jinja_pass_arg = filter_.jinja_pass_arg  # type: ignore[attr-defined]
    return counted


def _weighed(value: Any) -> Any:
    budget = _budget.get()
    if isinstance(value, str):
        budget.spend(len(value))
    else:
        budget.spend_on(value)
    return value


def _sliced(value: Any) -> Any:
    _budget.get().spend(len(value) if isinstance(value, str | list | tuple) else 0)
    return value


class _Rounds:
    """Values that a loop goes over, each round counted; it knows their number, so that the loop does."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        budget = _budget.get()
        for value in self._values:
            budget.spend()
            yield value


def _rounds(values: Any) -> Any:
    return _Rounds(values) if hasattr(values, "__len__") else iter(_Rounds(values))


def _concatenated(values: Sequence[Any]) -> str:
    _budget.get().spend_on(values)
    return "".join(map(str, values))


def _replaced(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    _budget.get().spend(len(text) + text.count(old) * max(len(new) - len(old), 0))
    return str(text.replace(old, new, -1 if count is None else count))


def _join(values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    items = list(values) if attribute is None else [value[attribute] for value in values]
    budget = _budget.get()
    budget.spend_on(items)
    budget.spend(len(d) * len(items))
    return str(d).join(map(str, items))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    indent = min(indent, 8) if indent is not None else None
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(str(message)[:500])


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(str(layout)[:100])


class _GenerationBlock(Extension):
    """Lets `{% generation %}` pass, with which templates mark for training what the assistant said."""

    tags = {"generation"}  # noqa: RUF012  (so declared in Jinja)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what stands in the block, as it stands."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
