"""Completions that are JSON documents, and fit their schema."""

from __future__ import annotations

from typing import Any

import pytest

from batchinfer.tasks.documents import Documents

OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "text", "fits"),
    [
        (OBJECT, '{"a": 1}', True),
        (OBJECT, '{"a": "1"}', False),
        (OBJECT, '{"a": 1', False),
        (OBJECT, "NaN", False),
        (OBJECT, "[" * 100_000, False),
        ({"anyOf": [{"required": ["a"]}, {"required": ["b"]}], "type": "object"}, "5", False),
        ({"$ref": "#/$defs/a", "minimum": 5, "$defs": {"a": {"type": "integer"}}}, "3", False),
        ({"items": {"$ref": "#"}, "type": "array"}, "[[[]], []]", True),
        ({"items": {"$ref": "#"}, "type": "array"}, "[[1]]", False),
        ({"type": "string", "pattern": "\\p{L}"}, '"x"', True),
        ({"type": "nothing"}, "1", True),  # nor a type
        ({"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 5,
          "exclusiveMinimum": True}, "5", False),
    ],
)  # fmt: skip
def test_a_document_fits_or_not(schema: dict[str, Any], text: str, fits: bool) -> None:
    assert Documents(schema).fitting(text) == (text if fits else None)
    assert Documents(schema).fitting(None) is None


@pytest.mark.parametrize("pattern", [r"^(\w|\w\w|.)+!!$", r"^(?=a)(\w|\w\w|.)+!!$", r"(a+)+\1b$"])
def test_a_pattern_ends_whatever_it_is_held_against(pattern: str) -> None:
    """Python's own would take longer than the tests."""
    text = '"' + "a" * 5000 + '"'
    assert Documents({"pattern": pattern}).fitting(text) is None
    assert Documents({"patternProperties": {pattern: {}}}).fitting(f"{{{text}: 1}}") is not None


def test_every_price_is_a_multiple_of_a_cent() -> None:
    cents = Documents({"type": "number", "multipleOf": 0.01})
    assert all(cents.fitting(f"{price / 100:.2f}") for price in range(10_000))
    assert cents.fitting("0.015") is None


@pytest.mark.parametrize(
    ("text", "is_whole"),
    [
        ("12", False),
        ("-1.5e3", False),
        ("12 ", True),
        ("[12]", True),
        ('"12"', True),
        ("true", True),
    ],
)
def test_a_number_at_the_end_of_a_cut_completion_may_be_incomplete(
    text: str, is_whole: bool
) -> None:
    assert Documents({}).fitting(text) == text
    assert Documents({}).fitting(text, is_cut=True) == (text if is_whole else None)
