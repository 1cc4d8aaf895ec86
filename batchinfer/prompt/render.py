"""Jinja2 templates over one row's values, in the immutable sandbox.

Must not know: chat, tokens. Values are data: they are inserted, never rendered. Invariant: whatever
a template does with one row's values ends as text or as that row's RowError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from functools import cache
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, Undefined
from jinja2.utils import Namespace

from batchinfer.errors import ConfigError, RowError
from batchinfer.prompt.bounds import check_printable
from batchinfer.prompt.numbers import readable_reason
from batchinfer.prompt.references import UnsupportedTemplate, find_references, operation_problem
from batchinfer.prompt.sandbox import Sandbox, begin_row, bounded_range
from batchinfer.prompt.stand_ins import default, is_defined, is_none, json_value

_MAX_MESSAGE_CHARS = 500
# Names that are not columns, so that a column of the same name is meant everywhere else; and
# nothing that a second run would render differently.
_FUNCTIONS = frozenset({"range", "namespace"})
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
                raise UnsupportedTemplate(problem)
            found = find_references(tree, _FUNCTIONS)
            environment.count_loops(tree)
            self._template = environment.from_string(tree)
        except TemplateSyntaxError as error:
            raise ConfigError(f"{key}, line {error.lineno}: {error.message}") from None
        except UnsupportedTemplate as error:
            raise ConfigError(f"{key}: {error}") from None
        except TemplateError as error:  # constants are computed now, and the sandbox refuses one
            raise ConfigError(f"{key}: {error.message}") from None
        except RecursionError:
            raise ConfigError(f"{key}: the template is nested too deeply") from None
        except Exception as error:  # Python's own bounds: nested loops, digits of a number
            raise ConfigError(f"{key}: {readable_reason(error)}") from None
        # A render copies the globals; copying jinja's ChainMap takes half the time of a short one.
        self._template.globals = dict(self._template.globals)
        self._has_address = has_address(source)  # then the template means it
        self.key = key
        self.columns: tuple[str, ...] = tuple(sorted(set(found.columns.values())))
        self.references = found.places
        self._renamed = {v: column for v, column in found.columns.items() if v != column}

    def render(self, values: Mapping[str, Any]) -> str:
        """The text for one row. `values`: column -> plain value. Raises RowError."""
        if self._renamed:
            values = {**values, **{v: values[column] for v, column in self._renamed.items()}}
        begin_row()
        try:
            text = self._template.render(values)
        except RowError:
            raise
        except Exception as error:  # the row's edge: a template can fail in any way Python can
            raise template_error(self.key, error) from error
        if not self._has_address:
            refuse_addresses(text, values.values(), self.key)
        return text


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


def has_address(source: str) -> bool:
    """Whether a template writes one of its own, which is then meant."""
    return _ADDRESS.search(source) is not None


def refuse_addresses(text: str, values: Iterable[Any], key: str) -> None:
    """Raise RowError for the address of a Python object that no value has in it.

    A filter or `~` makes text of a generator or a method as Python shows it, with its place in
    memory: `<generator object do_batch at 0x7f…>`, another one in each run.
    """
    if "0x" not in text and "0X" not in text:
        return
    found = [match[0] for match in _ADDRESS.finditer(text)]
    if found and not all(address in _all_text(values) for address in found):
        raise RowError(
            "template_error",
            f"{key}: what it prints has the address of a Python object in it: a "
            "method without its parentheses, or map, select or batch without `| list`",
        )


def _all_text(values: Iterable[Any]) -> str:
    """Also as filters like `upper` and `title` spell it."""
    text = " ".join(map(str, values))
    return "\n".join((text, text.lower(), text.upper(), text.title(), text.capitalize()))


@cache
def _environment() -> Sandbox:
    environment = Sandbox(undefined=StrictUndefined, finalize=_printable)
    environment.globals = {"range": bounded_range, "namespace": Namespace}
    del environment.filters["random"]
    environment.filters |= {"default": default, "d": default}
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
        check_printable(value)
        return value
    if value is None:
        raise RowError("missing_value", "the template prints a null; give it a default")
    raise TypeError(f"the template prints a {type(value).__name__}, which is not text")


def _to_json(value: Any, **options: Any) -> str:
    """The filter `tojson`. NaN and infinity are not JSON, and fail."""
    return json.dumps(value, default=json_value, allow_nan=False, **options)
