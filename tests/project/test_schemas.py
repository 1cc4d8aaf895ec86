"""The files in schemas/ are what the code says; a change of either shows here."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchinfer.cli.schemas import schema_files

SCHEMAS = Path(__file__).parents[2] / "schemas"


@pytest.mark.parametrize("name", schema_files())
def test_a_checked_in_schema_is_what_the_code_generates(name: str) -> None:
    assert (SCHEMAS / name).read_text() == schema_files()[name], "run `make schema`"


def test_no_schema_file_is_left_over() -> None:
    assert {path.name for path in SCHEMAS.iterdir()} == set(schema_files())
