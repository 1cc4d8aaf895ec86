"""Jinja2 templates over one row's values, in the immutable sandbox.

Must not know: chat, tokens. Values are data: they are inserted, never rendered. Invariant: whatever
a template does with one row's values ends as text or as that row's RowError.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from functools import cache, wraps
from itertools import islice
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, Undefined, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace

from batchinfer.errors import ConfigError, RowError
from batchinfer.prompt.numbers import check_integer, check_operation, check_places, readable_reason
from batchinfer.prompt.references import Refused, find_references, operation_problem
from batchinfer.prompt.stand_ins import default, is_defined, is_none, json_value

_MAX_MESSAGE_CHARS = 500
# Of what a template makes for one row; no model takes a tenth of it.
_MAX_CHARS = 2**27
_MAX_BATCH_PIECES = 4096
_MAX_STEPS = 1_000_000  # of all loops over `range` for one row
# Names that are no columns, so that a column of the same name is meant everywhere else; and
# nothing that a second run would render differently.
_FUNCTIONS = frozenset({"range", "namespace"})
_WIDE_FILTERS = ("center", "indent", "batch", "slice")  # given a width or a number
_WITH_WIDTHS = (str, bytes, int)  # methods: ljust, to_bytes
_ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}", re.IGNORECASE)
_PRINTABLE = (str, int, float, Decimal, list, tuple, dict, Undefined)


class TextTemplate:
    """A compiled template. `key` is its place in the job, for messages."""

    def __init__(self, source: str, key: str) -> None:
        """Raises ConfigError if the template is not valid."""
        environment = _environment()
        try:
            tree = environment.parse(source)
            if problem := operation_problem(tree, environment):
                raise Refused(problem)
            found = find_references(tree, _FUNCTIONS)
            self._template = environment.from_string(tree)
        except TemplateSyntaxError as error:
            raise ConfigError(f"{key}, line {error.lineno}: {error.message}") from None
        except Refused as error:
            raise ConfigError(f"{key}: {error}") from None
        except TemplateError as error:  # constants are computed now, and the sandbox refuses one
            raise ConfigError(f"{key}: {error.message}") from None
        except RecursionError:
            raise ConfigError(f"{key}: the template is nested too deeply") from None
        except Exception as error:  # Python's own bounds: nested loops, digits of a number
            raise ConfigError(f"{key}: {readable_reason(error)}") from None
        # A render copies the globals; copying jinja's ChainMap takes half the time of a short one.
        self._template.globals = dict(self._template.globals)
        self._has_address = _ADDRESS.search(source) is not None  # then the template means it
        self._has_range = any(name.name == "range" for name in tree.find_all(nodes.Name))
        self.key = key
        self.columns: tuple[str, ...] = tuple(sorted(set(found.columns.values())))
        self.references = found.places
        self._renamed = {v: column for v, column in found.columns.items() if v != column}

    def render(self, values: Mapping[str, Any]) -> str:
        """The text for one row. `values`: column -> plain value. Raises RowError."""
        if self._renamed:
            values = {**values, **{v: values[column] for v, column in self._renamed.items()}}
        if self._has_range:
            _steps.left = _MAX_STEPS
        try:
            text = self._template.render(values)
        except RowError:
            raise
        except Exception as error:  # the row's edge: a template can fail in any way Python can
            raise template_error(self.key, error) from error
        if not self._has_address and ("0x" in text or "0X" in text):
            self._check_addresses(text, values)
        return text

    def _check_addresses(self, text: str, values: Mapping[str, Any]) -> None:
        """A filter or `~` makes text of a generator or a method as Python shows it, with its place
        in memory: `<generator object do_batch at 0x7f…>`, another one in each run.
        """
        found = [match[0] for match in _ADDRESS.finditer(text)]
        if found and not all(address in _all_text(values) for address in found):
            raise RowError(
                "template_error",
                f"{self.key}: what it prints has the address of an object of Python in it: a "
                "method without its parentheses, or map, select or batch without `| list`",
            )


@cache
def text_template(source: str, key: str) -> TextTemplate:
    """The same one for the same text: shards are checked with it by the thousand."""
    return TextTemplate(source, key)


def template_error(key: str, error: Exception) -> RowError:
    """The error message of a row for an exception raised in a template."""
    return RowError(
        "template_error",
        f"{key}: {type(error).__name__}: {readable_reason(error)}"[:_MAX_MESSAGE_CHARS],
    )


def _all_text(values: Mapping[str, Any]) -> str:
    """Also as filters like `upper` and `title` spell it."""
    text = " ".join(map(str, values.values()))
    return "\n".join((text, text.lower(), text.upper(), text.title(), text.capitalize()))


class _Steps(threading.local):
    left = _MAX_STEPS


_steps = _Steps()


def _range(*arguments: int) -> range:
    """The function `range`: loops in loops must end, too."""
    found = safe_range(*arguments)
    _steps.left -= len(found)
    if _steps.left < 0:
        raise OverflowError(f"more than {_MAX_STEPS} steps over range() in one row")
    return found


class _Sandbox(ImmutableSandboxedEnvironment):
    """Bounds what a template can make of short values: it would take all memory for one row."""

    intercepted_binops = frozenset({"*", "**", "//", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            check_operation(operator, left, right)
        elif operator == "*" and _length_of(left, right) > _MAX_CHARS:
            raise OverflowError(f"{operator!r} makes more than {_MAX_CHARS} characters")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(function, "__self__", None), _WITH_WIDTHS):
            _check_widths((*args, *kwargs.values()))
        result = super().call(context, function, *args, **kwargs)
        check_integer(result)  # int.from_bytes
        return result

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Join what a template prints; a loop may print without an end."""
        pieces = iter(pieces)
        joined: list[str] = []
        num_chars = 0
        while batch := list(islice(pieces, _MAX_BATCH_PIECES)):
            joined.append("".join(batch))
            num_chars += len(joined[-1])
            if num_chars > _MAX_CHARS:
                raise OverflowError(f"the text has more than {_MAX_CHARS} characters")
        return "".join(joined)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(undefined=StrictUndefined, finalize=_printable)
    environment.globals = {"range": _range, "namespace": Namespace}
    del environment.filters["random"]
    environment.filters |= {"default": default, "d": default}
    environment.filters |= {name: _bounded(environment.filters[name]) for name in _WIDE_FILTERS}
    environment.filters["int"] = _bounded_int(environment.filters["int"])
    environment.filters["round"] = _bounded_round(environment.filters["round"])
    environment.tests |= {
        "none": is_none,
        "defined": is_defined,
        "undefined": lambda value: not is_defined(value),
    }
    environment.policies["json.dumps_function"] = _to_json
    return environment


def _printable(value: Any) -> Any:
    """What `{{ }}` may print: a method or a generator in a prompt is always a mistake."""
    if isinstance(value, _PRINTABLE):
        return value
    if value is None:
        raise RowError("missing_value", "the template prints a null; give it a default")
    raise TypeError(f"the template prints a {type(value).__name__}, which is no text")


def _to_json(value: Any, **options: Any) -> str:
    """The filter `tojson`. NaN and infinity are not JSON, and fail."""
    return json.dumps(value, default=json_value, allow_nan=False, **options)


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_widths((*args[1:], *kwargs.values()))
        return function(*args, **kwargs)

    return bounded


def _bounded_int(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def bounded(value: Any, *args: Any, **kwargs: Any) -> Any:
        check_integer(value)
        result = function(value, *args, **kwargs)
        check_integer(result)
        return result

    return bounded


def _bounded_round(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def bounded(value: Any, precision: Any = 0, method: Any = "common") -> Any:
        check_integer(value)
        check_places(precision)
        return function(value, precision, method)

    return bounded


def _check_widths(arguments: Iterable[Any]) -> None:
    """Text is filled up to them, by `center` and others."""
    for argument in arguments:
        if isinstance(argument, int) and argument > _MAX_CHARS:
            raise OverflowError(f"{argument} is more than {_MAX_CHARS}")


def _length_of(left: Any, right: Any) -> int:
    """Characters or entries of a product, if they can be many."""
    texts, factors = (str, bytes, list, tuple), (left, right)
    length = next((len(factor) for factor in factors if isinstance(factor, texts)), 0)
    times = next((factor for factor in factors if isinstance(factor, int)), 0)
    return length * times
