"""Which columns a template reads, found in its syntax tree before anything is rendered.

Must not know: rows, types. `row["any name"]` is the column of that name, where the template has no
variable of its own called `row`; the tree is rewritten so that it is a variable like the others.
Invariant: what a template can read of a row is known by name.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, nodes
from jinja2.meta import find_undeclared_variables
from jinja2.visitor import NodeTransformer

ROW = "row"
_GUARDS = ("default", "d", "defined", "undefined")


@dataclass(frozen=True, slots=True)
class Step:
    """One `.name`, `["name"]` or `[0]` behind a value."""

    key: str | int
    is_attribute: bool

    def __str__(self) -> str:
        return f".{self.key}" if self.is_attribute else f"[{json.dumps(self.key)}]"


@dataclass(frozen=True, slots=True)
class Reference:
    """A place where a column is read, with the steps into its value that are written there."""

    column: str
    steps: tuple[Step, ...]
    is_printed: bool  # by itself: nothing stands between it and the prompt
    is_called: bool
    is_guarded: bool  # by `default` or `is defined`, which also take what is not there


@dataclass(frozen=True, slots=True)
class References:
    """`columns`: variable of the rewritten tree -> column."""

    columns: dict[str, str]
    places: tuple[Reference, ...]


class UnsupportedTemplate(Exception):
    """What a template of one prompt cannot do: the sentence for whoever wrote it."""


def find_references(tree: nodes.Template, functions: frozenset[str]) -> References:
    """Look through `tree` and rewrite it. Raises UnsupportedTemplate; jinja2's errors pass.

    `functions`: names that are not columns where they are called.
    """
    if found := next(tree.find_all((nodes.Include, nodes.Import, nodes.FromImport)), None):
        raise UnsupportedTemplate(
            f"{type(found).__name__.lower()}: there are no other templates to load"
        )
    if tree.find(nodes.Extends):
        raise UnsupportedTemplate("extends: there are no other templates to load")
    spelt = _spell_apart(tree)
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx in ("store", "param")}
    _refuse_names(tree, functions - own)
    columns: dict[str, str] = {}
    if ROW not in own:
        taken = {name.name for name in tree.find_all(nodes.Name)}
        _RowReader(columns, taken).visit(tree)
    variables = find_undeclared_variables(tree) - columns.keys()
    columns |= {name: spelt.get(name, name) for name in variables}
    places = _places(tree, {v: c for v, c in columns.items() if v not in own})
    return References(columns, tuple(places))


def operation_problem(tree: nodes.Template, environment: Environment) -> str | None:
    """The first filter or test that does not exist, or lacks what it must be given.

    jinja2 says so only when the row is rendered, and of what is in a branch not even then.
    """
    for node in tree.find_all((nodes.Filter, nodes.Test)):
        is_filter = isinstance(node, nodes.Filter)
        known: Mapping[str, Any] = environment.filters if is_filter else environment.tests
        name = f"{type(node).__name__.lower()} {node.name!r}"
        if node.name not in known:
            return f"there is no {name}"
        function = inspect.unwrap(known[node.name])  # those for lists have an async twin around
        given = [None] * (1 + len(node.args) + hasattr(function, "jinja_pass_arg"))
        if node.dyn_args is None and node.dyn_kwargs is None:
            try:
                inspect.signature(function).bind(
                    *given, **{str(pair.key): None for pair in node.kwargs}
                )
            except TypeError as error:
                return f"{name}: {error}"
    return None


def _spell_apart(tree: nodes.Template) -> dict[str, str]:
    """Give names outside ASCII others within it: new -> old.

    A template is compiled to Python, for which names are one if they are under NFKC: an "é" of two
    characters is that of one, a ligature is its letters. Columns and Jinja know no such thing.
    """
    taken = {name.name for name in tree.find_all(nodes.Name)}
    new: dict[str, str] = {}

    def spell(name: str) -> str:
        if name.isascii():
            return name
        if name not in new:
            other = f"name_{len(new)}"
            while other in taken:
                other += "_"
            new[name] = other
        return new[name]

    for name in tree.find_all(nodes.Name):
        name.name = spell(name.name)
    for namespace in tree.find_all(nodes.NSRef):
        namespace.name = spell(namespace.name)
    for macro in tree.find_all(nodes.Macro):
        macro.name = spell(macro.name)
    for keyword in tree.find_all(nodes.Keyword):
        keyword.key = new.get(keyword.key, keyword.key)  # of a macro
    return {other: name for name, other in new.items()}


class _RowReader(NodeTransformer):
    """`row["name"]` becomes a variable, which is called as nothing else in the template."""

    def __init__(self, columns: dict[str, str], taken: set[str]) -> None:
        self._columns = columns
        self._taken = taken

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        value, key = node.node, node.arg
        if not (isinstance(value, nodes.Name) and value.name == ROW):
            return node
        if not (isinstance(key, nodes.Const) and isinstance(key.value, str)):
            return node
        variable = f"{ROW}_{len(self._columns)}"
        while variable in self._taken:
            variable += "_"
        self._columns[variable] = key.value
        return nodes.Name(variable, "load", lineno=node.lineno)


def _refuse_names(tree: nodes.Template, functions: frozenset[str]) -> None:
    """Names that mean something else than a column, used as if they were one."""
    called = {id(call.node) for call in tree.find_all(nodes.Call)}
    parts = {id(part.node) for part in tree.find_all(nodes.Getattr)}
    for name in tree.find_all(nodes.Name):
        is_function = name.name in functions and id(name) not in called
        if is_function or (name.name == "self" and id(name) not in parts):
            raise UnsupportedTemplate(
                f"{name.name!r} is not a variable in a template; for a column of that name write "
                f'{ROW}["{name.name}"]'
            )


def _places(tree: nodes.Template, columns: dict[str, str]) -> Iterator[Reference]:
    parents: dict[int, nodes.Node] = {}
    pending: list[nodes.Node] = [tree]
    while pending:
        node = pending.pop()
        for child in node.iter_child_nodes():
            parents[id(child)] = node
            pending.append(child)
    for name in tree.find_all(nodes.Name):
        if name.ctx != "load" or name.name not in columns:
            continue
        steps: list[Step] = []
        node, parent = name, parents[id(name)]
        while (step := _step(node, parent)) is not None:
            steps.append(step)
            node, parent = parent, parents[id(parent)]
        yield Reference(
            columns[name.name],
            tuple(steps),
            is_printed=isinstance(parent, nodes.Output),
            is_called=isinstance(parent, nodes.Call) and parent.node is node,
            is_guarded=isinstance(parent, nodes.Filter | nodes.Test) and parent.name in _GUARDS,
        )


def _step(node: nodes.Node, parent: nodes.Node) -> Step | None:
    """How `parent` reaches into `node`, if it does with a name or a number that is written out."""
    if isinstance(parent, nodes.Getattr):
        return Step(parent.attr, is_attribute=True)
    if isinstance(parent, nodes.Getitem) and parent.node is node:
        key = parent.arg
        if isinstance(key, nodes.Const) and isinstance(key.value, str | int):
            return Step(key.value, is_attribute=False)
    return None
