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
        ({"type": "string", "pattern": "\\p{L}"}, '"x"', True),  # no pattern of Python
        ({"type": "nothing"}, "1", True),  # nor a type
        ({"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 5,
          "exclusiveMinimum": True}, "5", False),
    ],
)  # fmt: skip
def test_a_document_fits_or_not(schema: dict[str, Any], text: str, fits: bool) -> None:
    assert Documents(schema).fitting(text) == (text if fits else None)
    assert Documents(schema).fitting(None) is None


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
def test_a_number_at_the_end_of_a_cut_completion_may_go_on(text: str, is_whole: bool) -> None:
    assert Documents({}).fitting(text) == text
    assert Documents({}).fitting(text, is_cut=True) == (text if is_whole else None)
