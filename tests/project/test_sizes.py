"""Sizes that a reader can hold: of functions, parameter lists, files and the names of tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_LINES = 60
MAX_PARAMETERS = 8
MAX_FILE_LINES = 350
MAX_TEST_NAME = 80

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def functions(folder: str) -> list[tuple[str, Function]]:
    return [
        (f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node)
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, Function)
    ]


def all_functions() -> Iterator[tuple[str, Function]]:
    for folder in ("batchinfer", "tests", "benchmarks"):
        yield from functions(folder)


def num_parameters(function: Function) -> int:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    rest = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    return len([argument for argument in named + rest if argument.arg not in ("self", "cls")])


def test_no_function_is_too_long() -> None:
    long = [
        place
        for place, function in all_functions()
        if (function.end_lineno or 0) - function.lineno + 1 >= MAX_LINES
    ]
    assert not long


def test_no_function_takes_too_much() -> None:
    many = [p for p, function in all_functions() if num_parameters(function) >= MAX_PARAMETERS]
    assert not many


def test_no_file_is_too_long() -> None:
    files = (ROOT / "batchinfer").rglob("*.py")
    long = [file.name for file in files if len(file.read_text().splitlines()) >= MAX_FILE_LINES]
    assert not long


def test_no_name_of_a_test_is_a_riddle() -> None:
    """What does not fit belongs in the docstring."""
    named = ((place, f.name) for place, f in functions("tests") if f.name.startswith("test_"))
    assert not [place for place, name in named if len(name) > MAX_TEST_NAME]
