"""Jinja2 templates over one row's values, in the immutable sandbox.

Must not know: chat, tokens. Values are data: they are inserted, never rendered. Invariant: whatever
a template does with one row's values ends as text or as that row's RowError.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from batchinfer.errors import ConfigError, RowError
from batchinfer.prompt.references import Refused, find_references, operation_problem

_MAX_MESSAGE_CHARS = 500
# Names that are no columns, so that a column of the same name is meant everywhere else; and
# nothing that a second run would render differently.
_FUNCTIONS = frozenset({"range", "namespace"})
_PRINTABLE = (str, int, float, list, tuple, dict, Undefined)


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
        # A render copies the globals; copying jinja's ChainMap takes half the time of a short one.
        self._template.globals = dict(self._template.globals)
        self.key = key
        self.columns: tuple[str, ...] = tuple(sorted(set(found.columns.values())))
        self.references = found.places
        self._renamed = {v: column for v, column in found.columns.items() if v != column}

    def render(self, values: Mapping[str, Any]) -> str:
        """The text for one row. `values`: column -> plain value. Raises RowError."""
        if self._renamed:
            values = {**values, **{v: values[column] for v, column in self._renamed.items()}}
        try:
            return self._template.render(values)
        except RowError:
            raise
        except Exception as error:  # the row's edge: a template can fail in any way Python can
            raise template_error(self.key, error) from error


@cache
def text_template(source: str, key: str) -> TextTemplate:
    """The same one for the same text: shards are checked with it by the thousand."""
    return TextTemplate(source, key)


def template_error(key: str, error: Exception) -> RowError:
    """What a row is told about an exception out of a template."""
    return RowError(
        "template_error", f"{key}: {type(error).__name__}: {error}"[:_MAX_MESSAGE_CHARS]
    )


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=_printable)
    environment.globals = {name: environment.globals[name] for name in _FUNCTIONS}
    del environment.filters["random"]
    return environment


def _printable(value: Any) -> Any:
    """What `{{ }}` may print: a method or a generator in a prompt is always a mistake."""
    if isinstance(value, _PRINTABLE):
        return value
    if value is None:
        raise RowError("missing_value", "the template prints a null; give it a default")
    raise TypeError(f"the template prints a {type(value).__name__}, which is no text")
