"""What an evaluation is asked and what it answers, through JSON and back."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from batchinfer.evaluation import PerplexityRequest, Record


def record(**changes: object) -> Record:
    values = {
        "label": "int4", "family": "int4", "model": "m", "dtype": "float32", "context": 512,
        "stride": 256, "windows": 9, "tokens": 2_303, "nll": 3.0, "perplexity": 20.085536923187668,
        "data_digest": "ab", "batchinfer_version": "1", **changes,
    }  # fmt: skip
    return Record(**values)


def test_a_record_and_a_request_go_through_json_unchanged() -> None:
    """Floats to the last bit."""
    have = record(kl=0.1 + 0.2)
    assert Record.model_validate_json(have.model_dump_json()) == have
    asked = PerplexityRequest(label="a", model="m", settings={"engine.max_num_seqs": 8})
    assert PerplexityRequest.model_validate_json(asked.model_dump_json()) == asked


def test_a_failed_request_is_a_record_too() -> None:
    failed = Record(label="a", family="f", model="m", error="no model", batchinfer_version="1")
    assert failed.perplexity is None


@pytest.mark.parametrize("changes", [{"nll": None}, {"perplexity": float("inf")}, {"bpw": 4}])
def test_a_record_is_never_half_a_measurement(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        record(**changes)


def test_neither_can_be_changed() -> None:
    with pytest.raises(ValidationError):
        record().label = "other"
