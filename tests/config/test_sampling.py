"""What is asked of sampling settings beside their values."""

from __future__ import annotations

from typing import Any

import pytest

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
