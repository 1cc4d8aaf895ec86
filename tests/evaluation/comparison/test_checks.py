"""What refuses a whole comparison before anything is computed, and what is left to be a row."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from batchinfer.errors import ConfigError
from batchinfer.evaluation.comparison.checks import check_inputs
from batchinfer.evaluation.comparison.spec import Spec, requests_of
from tests.support.adapters import write_adapter
from tests.support.jobs import MODEL


def check(**spec: Any) -> None:
    check_inputs(requests_of(Spec.model_validate(spec)), "s.yaml")


def problems(**spec: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(**spec)
    return str(caught.value).splitlines()


def entry(**settings: Any) -> dict[str, Any]:
    return {"model": str(MODEL), "label": "a", "settings": settings}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def test_the_key_the_entry_and_what_is_wrong_are_named(tmp_path: Path) -> None:
    """All at once, one a line."""
    found = problems(
        data=str(tmp_path / "no.txt"),
        context=99_999,
        entries=[
            entry(**{"model.lora": "nowhere"}),
            {"model": "gone", "formats": ["int8", "int4"]},
        ],
    )
    assert [line.partition(": ")[2].partition(": ")[0] for line in found] == [
        "data",
        "entries.0.settings (a)",
        "context (a)",
        "entries.1.model (gone int8)",
    ]
    assert all(line.startswith("s.yaml: ") for line in found)
    assert "the context of 99999 tokens is more than the 2048" in found[-2]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"model.lora": "nowhere"}, "model.lora: there is no folder"),
        ({"model.lora": str(MODEL)}, "adapter_config.json is missing"),
        ({"model.tokenizer": "nowhere"}, "model.tokenizer: there is no folder"),
        ({"model.tokenizer": str(MODEL.parent)}, "has no tokenizer"),
        ({"engine.max_num_seqs": -1}, "settings: engine.max_num_seqs: must be"),
        ({"engine.options.no_such_option": 1}, "no_such_option"),
        ({"model.max_model_len": 99_999}, "more than the model's context length of 2048"),
        ({"model.max_model_len": 64}, "the context of 2048 tokens is more than the 64"),
    ],
)
def test_a_setting_that_cannot_be(settings: dict[str, Any], problem: str) -> None:
    (found,) = problems(entries=[entry(**settings)])
    assert problem in found
    assert "(a)" in found


def damage_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"model": 1}')


def remove_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def remove_config(model: Path) -> None:
    (model / "config.json").unlink()


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (damage_tokenizer, "cannot be loaded"),
        (remove_tokenizer, "has no tokenizer"),
        (remove_config, "config.json is missing"),
    ],
)
def test_a_folder_that_no_tokenizer_or_model_is_in(
    harm: Callable[[Path], None], problem: str, model: Path
) -> None:
    harm(model)
    (found,) = problems(entries=[{"model": str(model), "label": "a"}])
    assert found.startswith("s.yaml: entries.0.model (a): ")
    assert problem in found


def test_a_tokenizer_that_an_entry_names_itself_is_not_the_models(model: Path) -> None:
    damage_tokenizer(model)
    check(entries=[{"model": str(model), "settings": {"model.tokenizer": str(MODEL)}}])
    (found,) = problems(entries=[entry(**{"model.tokenizer": str(model)})])
    assert found.startswith("s.yaml: entries.0.settings (a): the tokenizer in")


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    fitting = write_adapter(tmp_path / "fitting", scale=0.1)
    check(entries=[entry(**{"model.lora": str(fitting)})])
    larger = write_adapter(tmp_path / "larger", scale=0.1, num_layers=7)
    (found,) = problems(entries=[entry(**{"model.lora": str(larger)})])
    assert "it is the adapter of another model" in found


def test_what_is_wrong_inside_a_model_is_left_to_its_row(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"")
    check(entries=[{"model": str(model)}, {"model": str(MODEL), "quantization": "awq"}])
    (model / "config.json").write_text("{")
    check(entries=[{"model": str(model)}])


@pytest.mark.parametrize(
    ("rows", "column", "problem"),
    [
        (["", " \n", None], "t", "is empty, or only white space"),
        (["a b"], "u", "there is no column 'u'"),
        ([1], "t", "is int64, not text"),
    ],
)
def test_a_text_that_no_entry_can_be_measured_on(
    rows: list[Any], column: str, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "t.parquet"
    pl.DataFrame({"t": rows}).write_parquet(path)
    (found,) = problems(data=str(path), column=column, entries=[entry()])
    assert found.startswith("s.yaml: data: ")
    assert problem in found
