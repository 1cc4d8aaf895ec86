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
