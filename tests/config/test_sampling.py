"""What is asked of sampling settings beside their values."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from batchinfer.config import SamplingSettings, StructuredSettings


@pytest.mark.parametrize(
    ("settings", "is_seeded"),
    [
        ({"seed": 0, "temperature": 1.0}, True),
        ({"seed": 0}, False),  # greedy
        ({"temperature": 1.0}, False),
    ],
)
def test_requests_carry_seeds_where_the_job_has_one_and_is_not_greedy(
    settings: dict[str, Any], is_seeded: bool
) -> None:
    assert SamplingSettings(**settings).uses_seeds is is_seeded


def test_the_constraint_is_the_one_that_is_given_as_plain_data() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert StructuredSettings(json_schema=schema).constraint == ("json_schema", schema)
    assert type(StructuredSettings(json_schema=schema).constraint[1]["properties"]) is dict
    assert StructuredSettings(choice=("a", "b")).constraint == ("choice", ["a", "b"])


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"$ref": "http://x.org/s.json"}, "is not in the schema"),
        ({"items": {"$ref": "other.json#/a"}}, "is not in the schema"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {}}, "leads nowhere"),
        ({"anyOf": [{"type": "null"}, {"$ref": "#name"}]}, "leads nowhere"),
        ({"anyOf": [{"$ref": "#/anyOf/1"}]}, "leads nowhere"),
    ],
)
def test_a_reference_that_an_engine_would_leave_out_is_refused(
    schema: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValidationError, match=problem):
        StructuredSettings(json_schema=schema)


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "strng"}, '/type: "strng"'),
        ({"properties": {"a": {"minLength": -1}}}, "/properties/a/minLength: -1"),
        ({"properties": {"a": {"type": "string", "required": True}}}, "/properties/a/required"),
        ({"items": [1]}, "/items: "),
    ],
)
def test_a_keyword_that_cannot_have_its_value_is_refused_with_its_place(
    schema: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValidationError, match=f"not a valid JSON Schema: {problem}"):
        StructuredSettings(json_schema=schema)


@pytest.mark.parametrize(
    "version", ["http://127.0.0.1:9/schema", 2020, ["http://json-schema.org/draft-07/schema#"], "x"]
)
def test_a_version_of_json_schema_that_is_not_known_is_refused(version: Any) -> None:
    with pytest.raises(ValidationError, match=r"/\$schema: .* is not a known version"):
        StructuredSettings(json_schema={"$schema": version, "type": "object"})


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "\\p{L}+"},
        {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "null"}]},
        {
            "$schema": "http://json-schema.org/draft-04/schema#",
            "exclusiveMinimum": True,
            "minimum": 1,
        },
        {"x-order": 1, "type": "string", "format": "no format"},
    ],
)
def test_what_a_version_of_json_schema_allows_is_taken(schema: dict[str, Any]) -> None:
    assert StructuredSettings(json_schema=schema).constraint == ("json_schema", schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"items": {"$ref": "#"}},
        {"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": {"type": "null"}}},
        {"anyOf": [{"$ref": "#/anyOf/1"}, {"type": "null"}]},
        {"$ref": "#name", "$defs": {"a": {"$anchor": "name"}}},
        {"properties": {"$ref": {"type": "string"}}},
        {"enum": [{"$ref": "http://x.org/"}]},
    ],
)
def test_a_reference_inside_of_the_schema_is_taken(schema: dict[str, Any]) -> None:
    assert StructuredSettings(json_schema=schema).constraint == ("json_schema", schema)
