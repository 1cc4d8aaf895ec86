"""YAML with the 1.2 core schema, as editors assume it: `no` and `on` are text, 1e-3 is a number.

PyYAML resolves scalars by YAML 1.1 (`no` is false, 12:30:00 is 45000, a date is an object). Here
its parser builds the node tree and the core schema says what a scalar is. Must not know: what a
job is.
Invariants: the data is plain JSON data, and every key in it has a line; a file of any content is
read or refused in bounded time and memory, however its aliases multiply.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from batchinfer.errors import ConfigError

#: Values in a document; where an alias stands, all that it stands for counts again.
MAX_VALUES: Final = 100_000
MAX_DEPTH: Final = 100
#: So many characters of a dotted key weigh as much as a value: each key is kept with its line.
_KEY_CHARS_OF_A_VALUE = 256


@dataclass(frozen=True, slots=True)
class Document:
    """A loaded file. `lines`: dotted key (list entries by index) -> line from 1."""

    data: Any
    lines: Mapping[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()  # "file:line: …", the file loads but must not be used


class _CoreLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalar types of the YAML 1.2 core schema, and with bounds."""

    num_nodes = 0
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        self.num_nodes += 1
        self.depth += 1
        if self.num_nodes > MAX_VALUES or self.depth > MAX_DEPTH:
            raise _TooLarge(self.get_mark(), self.depth)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _TooLarge(yaml.MarkedYAMLError):
    def __init__(self, mark: yaml.Mark, depth: int) -> None:
        what = f"more than {MAX_VALUES:,} values, counting those that aliases stand for"
        if depth > MAX_DEPTH:
            what = f"values in values more than {MAX_DEPTH} deep"
        super().__init__(problem=f"too large: {what}", problem_mark=mark)


_CORE: Final = "tag:yaml.org,2002:"  # what the tags of the core schema begin with

_CoreLoader.yaml_implicit_resolvers = {}  # its own, else the 1.1 resolvers are inherited
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _CoreLoader.add_implicit_resolver(f"{_CORE}{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def _integer(text: str) -> int:
    prefix = text[:2]
    return int(text[2:], {"0o": 8, "0x": 16}[prefix]) if prefix in ("0o", "0x") else int(text)


def _real(text: str) -> float:
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _joined(text: str) -> str:
    """JSON escapes a character beyond 16 bits as two; PyYAML leaves them two."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:  # one alone: no text, which the caller finds
        return text


_SCALARS: dict[str, Callable[[str], Any]] = {
    f"{_CORE}null": lambda _: None,
    f"{_CORE}bool": lambda text: {"true": True, "false": False}[text.lower()],
    f"{_CORE}int": _integer,
    f"{_CORE}float": lambda text: _real(text.lower()),
    f"{_CORE}str": lambda text: text if text.isascii() else _joined(text),
}


def load_yaml(text: str, name: str) -> Document:
    """Parse one YAML document; `name` is the file's name in messages.

    Raises ConfigError with file and line where the file is not YAML. Duplicate keys and the like
    are `problems` of the result, so that the caller can report them together with its own.
    """
    loader: yaml.SafeLoader | None = None
    builder = _Builder(name)
    try:
        loader = _CoreLoader(text)
        root = loader.get_single_node()
        data = None if root is None else builder.build(root, "")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        what = "" if isinstance(error, _TooLarge) else "not valid YAML: "
        raise ConfigError(f"{where}: {what}{reason}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{name}:{line}: not valid YAML: {error.reason}") from None
    except (ValueError, OverflowError) as error:  # a \\U escape, a number of a directive
        raise ConfigError(f"{name}: not valid YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()
    return Document(data, builder.lines, tuple(builder.problems))


class _Builder:
    """Turns nodes into data and notes the line of every key on the way."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[str, int] = {}
        self.problems: list[str] = []
        self._size = 0
        self._open: set[int] = (
            set()
        )  # ids of the nodes we are inside of: an alias to one never ends

    def build(self, node: yaml.Node, key: str) -> Any:
        self._size += 1 + len(key) // _KEY_CHARS_OF_A_VALUE
        if self._size > MAX_VALUES or len(self._open) > MAX_DEPTH:
            raise _TooLarge(node.start_mark, len(self._open))
        self.lines.setdefault(key, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        kind = "seq" if isinstance(node, yaml.SequenceNode) else "map"
        if node.tag not in (f"{_CORE}{kind}", "!"):
            return self._unsupported(node)
        if id(node) in self._open:
            return self._problem(node, "an alias refers to the value it is in")
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [
                    self.build(child, _join(key, str(index)))
                    for index, child in enumerate(node.value)
                ]
            return self._mapping(node, key)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: yaml.Node, key: str) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for name_node, child in node.value:
            name = self._scalar(name_node) if isinstance(name_node, yaml.ScalarNode) else None
            line = name_node.start_mark.line + 1
            if not isinstance(name, str):
                written = f" {name_node.value:.40}" if isinstance(name, bool | int | float) else ""
                self._problem(name_node, f"key{written} must be text: put it in quotes")
                continue
            child_key = _join(key, name)
            if name in mapping:
                first = self.lines[child_key]
                self._problem(name_node, f"{child_key}: given twice, first in line {first}")
                continue
            self.lines[child_key] = line
            mapping[name] = self.build(child, child_key)
        return mapping

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        convert = _SCALARS.get(node.tag)
        if convert is None:
            return self._unsupported(node)
        try:
            return convert(node.value)
        except (ValueError, KeyError):
            return self._problem(node, f"{node.value!r:.40} is not a value of its tag")

    def _unsupported(self, node: yaml.Node) -> None:
        self._problem(node, f"the tag {node.tag.rpartition(':')[2]} is not supported")

    def _problem(self, node: yaml.Node, sentence: str) -> None:
        self.problems.append(f"{self.name}:{node.start_mark.line + 1}: {sentence}")


def _join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child
