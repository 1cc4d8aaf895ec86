"""What people write into a template's key and do not mean: paths, braces of other languages, column
names that are not variables. Found in the text, where jinja2 reports nothing useful.

Must not know: rows, types. Invariant: what is refused here would give wrong prompts, or none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from jinja2 import Environment, TemplateSyntaxError

from batchinfer.config.template_file import is_path
from batchinfer.errors import ConfigError
from batchinfer.prompt.references import ROW

#: Names that jinja2 reads as something else, so they are not variables.
_CONSTANTS = frozenset({"true", "false", "none", "True", "False", "None"})
_WORDS = frozenset({"and", "or", "not", "in", "is", "if", "else", "self", "range", "namespace"})
_TAKEN = _CONSTANTS | _WORDS
_NUMBER = re.compile(r"\d[\d_]*(\.\d+)?([eE][+-]?\d+)?")
_REGION = re.compile(r"\{\{(.*?)\}\}|\{%(.*?)%\}", re.DOTALL)
# "{text}", "{text!r:>8}", "${text}", "%(text)s"
_FOREIGN = re.compile(
    r"(?<![{\\])\$?\{(?P<braces>[^{}\n]+)\}(?!\})|%\((?P<percent>[^()\n]+)\)[a-z]"
)
_ENDS_NAME = re.compile(r"[!:.\[]")
_LEXER = Environment()
_CHAT_PARSER = Environment(extensions=["jinja2.ext.loopcontrols"])


def written(column: str) -> str:
    """How a template names a column."""
    if column.isidentifier() and column not in _TAKEN:
        return column
    return f"{ROW}[{json.dumps(column, ensure_ascii=False)}]"


def refuse_path(text: str, key: str) -> None:
    """Raise ConfigError if a template's text is the place of one."""
    if is_path(text):
        raise ConfigError(
            f"{key}: {text.strip()} is a path, but this key takes the template's text: paste it "
            "here, below `|` if it has several lines"
        )


def refuse_unsayable(source: str, key: str, columns: Sequence[str]) -> None:
    """Raise ConfigError if an expression has a column's name that jinja2 reads as something else.

    `label-coarse` is a difference and `2nd` an error, whatever columns there are.
    """
    odd = [name for name in columns if written(name) != name and re.search(r"\w", name)]
    if not odd:
        return
    for code, is_print in _expressions(source):
        first = code.split("|")[0].strip()
        for name in odd:
            if _NUMBER.fullmatch(name) or name in _TAKEN:
                is_meant = is_print and first == name
            else:
                stripped = name.strip()  # alone, as `{{ text }}` also has the column "text "
                is_meant = not stripped.isidentifier() and bool(_named(stripped).search(code))
            if is_meant:
                raise ConfigError(
                    f"{key} has {name!r}, a column whose name is not a variable: write "
                    f"{{{{ {written(name)} }}}}, or rename the column. If you mean something else, "
                    "put spaces between its parts"
                )


def refuse_constant(sources: Sequence[tuple[str, str]], key: str, columns: Sequence[str]) -> None:
    """Raise ConfigError about templates, (key, text) each, if none reads a column."""
    foreign = next((pair for _, text in sources for pair in foreign_names(text, columns)), None)
    if foreign is not None:
        as_it_is, column = foreign
        raise ConfigError(
            f"{key}: {as_it_is} is not a variable and stays as it is in every row: write "
            f"{{{{ {written(column)} }}}}"
        )
    example = written(columns[0]) if columns else "text"
    raise ConfigError(
        f"{key} uses no input column, so every row would get the same prompt: write "
        f"{{{{ {example} }}}} where the row's value belongs; there are {', '.join(columns)}. If "
        f"the same prompt is wanted in every row, read a column without printing it: "
        f"{{% set _ = {example} %}}"
    )


def refuse_chat_template(source: str, key: str) -> None:
    """Raise ConfigError if a chat template cannot have a conversation in its result."""
    refuse_path(source, key)
    if not any(re.search(r"\bmessages\b", code) for code, _ in _expressions(source)):
        try:  # an unclosed brace is not an expression
            _CHAT_PARSER.parse(source)
        except TemplateSyntaxError as error:
            raise ConfigError(f"{key}, line {error.lineno}: {error.message}") from None
        raise ConfigError(
            f"{key} does not use `messages`, so every row would get the same prompt: it takes the "
            "text of a Jinja2 template that writes out the conversation"
        )


def foreign_names(source: str, columns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(as it is written, column) for each column that the text names as other languages do."""
    for text in _texts(source):
        for match in _FOREIGN.finditer(text):
            inner = match["braces"] or match["percent"]
            for name in (inner, _ENDS_NAME.split(inner)[0].strip()):
                if name in columns:
                    yield match[0], name
                    break


def _named(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w.]){re.escape(name)}(?!\w)")


def _expressions(source: str) -> Iterator[tuple[str, bool]]:
    """(code without the texts in it, whether it is printed) of each `{{ }}` and `{% %}`."""
    try:
        tokens = list(_LEXER.lex(source))
    except TemplateSyntaxError:  # a character that jinja2 has no use for
        for match in _REGION.finditer(source):
            yield match[1] or match[2] or "", match[1] is not None
        return
    code: list[str] = []
    for _, kind, value in tokens:
        if kind in ("variable_begin", "block_begin"):
            code = []
        elif kind in ("variable_end", "block_end"):
            yield "".join(code), kind == "variable_end"
        else:
            code.append('""' if kind == "string" else value)


def _texts(source: str) -> Iterator[str]:
    """What is outside of all expressions."""
    ends = [(0, 0), *(match.span() for match in _REGION.finditer(source)), (len(source),) * 2]
    for (_, start), (stop, _) in pairwise(ends):
        yield source[start:stop]
