"""Jinja's immutable sandbox, and in it an end of what a template makes of one row's values.

Length is made by operators, by methods of texts, by filters and by loops; each asks `bounds` before
it makes something, and what it has made is looked at again. Must not know: rows, columns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from itertools import islice
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import (
    ImmutableSandboxedEnvironment,
    SandboxedEscapeFormatter,
    SandboxedFormatter,
    safe_range,
)

from batchinfer.prompt import bounds
from batchinfer.prompt.numbers import check_integer, check_operation, check_places

_MAX_BATCH_PIECES = 4096
_MAX_STEPS = 1_000_000  # of all loops over `range`, and of all calls, for one row
_MAX_LOOPED = 4_000_000  # of all loops
_COUNTED = "counted loop"  # a filter that no template can name
_WITH_WIDTHS = (str, bytes, int)  # methods: ljust, to_bytes
_OF_TEXT = frozenset(
    {
        *("capitalize", "center", "e", "escape", "forceescape", "indent", "lower", "pprint"),
        *("replace", "safe", "string", "striptags", "title", "tojson", "trim", "truncate"),
        *("upper", "urlencode", "urlize", "wordcount", "wordwrap"),
    }
)
_OF_PIECES = frozenset({"batch", "groupby", "list", "slice", "sort", "unique", "wordcount"})
_SPLITTING = frozenset({"split", "rsplit", "splitlines"})


class _Left(threading.local):
    steps = calls = _MAX_STEPS
    looped = _MAX_LOOPED


_left = _Left()


def begin_row() -> None:
    """Count again."""
    _left.steps = _left.calls = _MAX_STEPS
    _left.looped = _MAX_LOOPED


def bounded_range(*arguments: int) -> range:
    """The function `range`: loops in loops must end, too."""
    found = safe_range(*arguments)
    _left.steps -= len(found)
    if _left.steps < 0:
        raise OverflowError(f"more than {_MAX_STEPS} steps over range() in one row")
    return found


class _Formatter(SandboxedFormatter):
    """What `format` and `format_map` of a text write."""

    num_chars = 0

    def format_field(self, value: Any, format_spec: str) -> Any:
        bounds.check_width_in(format_spec)
        bounds.check_printable(value)
        text = super().format_field(value, format_spec)
        self.num_chars += len(text)
        bounds.check_chars(self.num_chars)
        return text


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    """The same for a text of markup."""


class _Generator(CodeGenerator):
    """`~` asks the environment."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Sandbox(ImmutableSandboxedEnvironment):
    """Bounds what a template can make of short values: it would take all memory for one row."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"*", "**", "//", "%", "+"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters |= {name: _bounded(name, function) for name, function in self.filters.items()}
        self.filters[_COUNTED] = _counted

    def count_loops(self, tree: nodes.Template) -> None:
        """Let each loop of a template count its steps."""
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _COUNTED, [], [], None, None, lineno=loop.lineno)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            check_operation(operator, left, right)
        else:
            bounds.check_operation_on_text(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        _left.calls -= 1
        if _left.calls < 0:
            raise OverflowError(f"more than {_MAX_STEPS} calls in one row")
        of = getattr(function, "__self__", None)
        if isinstance(of, _WITH_WIDTHS):
            bounds.check_widths((*args, *kwargs.values()))
        if isinstance(of, str | bytes):
            args = _checked(of, function.__name__, args)
        elif isinstance(function, LoopContext) and args:
            args = (_count(args[0]), *args[1:])
        result = super().call(context, function, *args, **kwargs)
        check_integer(result)  # int.from_bytes
        return bounds.check_made(result)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        text, is_map = value.__self__, value.__name__ == "format_map"

        def wrapper(*args: Any, **kwargs: Any) -> str:
            if is_map:
                (kwargs,), args = args, ()
            escape = getattr(text, "escape", None)  # of a text of markup
            of = _EscapeFormatter(self, escape=escape) if escape else _Formatter(self)
            formatted: str = type(text)(of.vformat(text, args, kwargs))
            return formatted

        return wraps(value)(wrapper)

    @staticmethod
    def joined(parts: Iterable[Any]) -> str:
        """The operator `~`."""
        parts = tuple(parts)
        bounds.check_printable(*parts)
        return "".join(map(str, parts))

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Join what a template prints; a loop may print without an end."""
        pieces = iter(pieces)
        joined: list[str] = []
        num_chars = 0
        while batch := list(islice(pieces, _MAX_BATCH_PIECES)):
            joined.append("".join(batch))
            num_chars += len(joined[-1])
            bounds.check_chars(num_chars)
        return "".join(joined)


def _count(values: Any) -> Any:
    """As they are, or with a count of those that nobody knows the number of."""
    if not hasattr(values, "__len__"):
        return _counting(values) if hasattr(values, "__iter__") else values
    _left.looped -= len(values) + 1
    _check_looped()
    return values


def _counting(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _left.looped -= 1
        _check_looped()
        yield value


def _check_looped() -> None:
    if _left.looped < 0:
        raise OverflowError(f"more than {_MAX_LOOPED} steps of loops in one row")


@pass_context  # so never computed while the template is compiled
def _counted(_: Context, values: Any) -> Any:
    return _count(values)


def _checked(text: Any, method: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a method of a text, once it is known that they make no endless one."""
    if method == "join" and len(args) == 1:
        values = list(args[0])
        bounds.check_join(text, values)
        return (values,)
    if not isinstance(text, str):
        text, args_of = text.decode("latin-1"), [_as_text(argument) for argument in args]
    else:
        args_of = list(args)
    if method == "replace" and len(args_of) >= 2:
        bounds.check_replace(text, args_of[0], args_of[1])
    elif method == "expandtabs":
        width = args_of[0] if args_of and isinstance(args_of[0], int) else 8
        bounds.check_chars(len(text) + text.count("\t") * max(0, width))
    elif method in _SPLITTING:
        bounds.check_split(text, args_of[0] if args_of else None)
    elif method == "translate" and args_of:
        bounds.check_translate(text, args_of[0])
    return args


def _as_text(value: Any) -> Any:
    return value.decode("latin-1") if isinstance(value, bytes) else value


# Checks of filters, each called as jinja's own filter is; what they return replaces the arguments.


def _check_batch(value: Any, linecount: Any, fill_with: Any = None) -> None:
    bounds.check_widths([linecount], bounds.MAX_PIECES)


def _check_center(value: Any, width: Any = 80) -> None:
    bounds.check_widths([width])


def _check_format(value: Any, *args: Any, **kwargs: Any) -> None:
    bounds.check_percent(str(value), kwargs or args)


def _check_indent(s: Any, width: Any = 4, first: Any = False, blank: Any = False) -> None:
    bounds.check_indent(str(s), width)


def _check_int(value: Any, default: Any = 0, base: Any = 10) -> None:
    check_integer(value)


def _check_join(value: Any, d: Any = "", attribute: Any = None) -> tuple[Any, ...]:
    values = list(value)  # what a filter before it makes has no length yet
    bounds.check_join(d, values)
    return values, d, attribute


def _check_replace(s: Any, old: Any, new: Any, count: Any = None) -> None:
    bounds.check_replace(str(s), old, new)


def _check_round(value: Any, precision: Any = 0, method: Any = "common") -> None:
    check_integer(value)
    check_places(precision)


def _check_slice(value: Any, slices: Any, fill_with: Any = None) -> None:
    bounds.check_widths([slices], bounds.MAX_PIECES)


def _check_sum(iterable: Any, attribute: Any = None, start: Any = 0) -> tuple[Any, ...] | None:
    if not isinstance(start, list | tuple):
        return None
    values = list(iterable)
    num_entries = bounds.size_of(values).entries
    bounds.check_entries(num_entries)
    bounds.check_copied(len(values) * num_entries)  # each list is copied into the next
    return values, attribute, start


def _check_tojson(value: Any, indent: Any = None) -> None:
    bounds.check_json(value, indent)


def _check_urlize(value: Any, *args: Any, **kwargs: Any) -> None:
    per_link = sum(len(given) for given in (*args, *kwargs.values()) if isinstance(given, str))
    bounds.check_chars(len(str(value).split()) * per_link)


def _check_wordwrap(
    s: Any,
    width: Any = 79,
    break_long_words: Any = True,
    wrapstring: Any = None,
    *_: Any,
    **__: Any,
) -> None:
    bounds.check_wrapped(str(s), width, wrapstring)


_CHECKS: dict[str, Callable[..., tuple[Any, ...] | None]] = {
    "batch": _check_batch,
    "center": _check_center,
    "format": _check_format,
    "indent": _check_indent,
    "int": _check_int,
    "join": _check_join,
    "replace": _check_replace,
    "round": _check_round,
    "slice": _check_slice,
    "sum": _check_sum,
    "tojson": _check_tojson,
    "urlize": _check_urlize,
    "wordwrap": _check_wordwrap,
}


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, with its checks before it and after it."""
    num_passed = int(hasattr(function, "jinja_pass_arg"))
    is_of_text, is_of_pieces = name in _OF_TEXT, name in _OF_PIECES
    check = _CHECKS.get(name)

    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        value = args[num_passed] if len(args) > num_passed else None
        if is_of_text:
            bounds.check_printable(value)
        if is_of_pieces and isinstance(value, str):
            bounds.check_entries(len(value))
        if check is not None:
            replaced = check(*args[num_passed:], **kwargs)
            if replaced is not None:
                args, kwargs = (*args[:num_passed], *replaced), {}
        result = function(*args, **kwargs)
        check_integer(result)
        return bounds.check_made(result)

    return bounded
