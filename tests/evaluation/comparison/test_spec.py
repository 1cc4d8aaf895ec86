"""Specs: what they come to, and how each mistake is named with its line."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from batchinfer.errors import ConfigError
from batchinfer.evaluation.comparison.run import choose
from batchinfer.evaluation.comparison.spec import Planned, read_spec, requests_of
from tests.support.jobs import ROOT


def planned(folder: Path, text: str, name: str = "spec.yaml") -> list[Planned]:
    path = folder / name
    path.write_text(text)
    return requests_of(read_spec(path))


def test_formats_are_an_entry_each(tmp_path: Path) -> None:
    found = planned(tmp_path, "entries: [{model: some/demo, formats: [fp32, int8]}]")
    assert [plan.label for plan in found] == ["demo fp32", "demo int8"]
    assert [plan.request.quantization for plan in found] == ["fp32", "int8"]
    assert {plan.request.family for plan in found} == {"demo"}


def test_an_entry_is_called_after_its_model(tmp_path: Path) -> None:
    text = """\
entries:
  - {model: models/Llama-8B}
  - {model: models/Llama-8B, quantization: int8}
  - {model: models/Llama-8B-awq, family: Llama-8B}
  - {model: models/x, family: Llama-8B, label: mine}
"""
    found = planned(tmp_path, text.replace("family: Llama-8B}", "family: Llama-8B, label: awq}"))
    assert [plan.label for plan in found] == ["Llama-8B", "Llama-8B int8", "awq", "mine"]


def test_what_the_spec_says_holds_for_every_entry(tmp_path: Path) -> None:
    text = """\
data: texts.parquet
column: text
context: 512
stride: 128
max_rows: 7
settings: {engine.max_num_seqs: 8, engine.options.enforce_eager: true}
entries: [{model: a, dtype: bfloat16, settings: {engine.max_num_seqs: 2}}]
"""
    (plan,) = planned(tmp_path, text)
    request = plan.request
    assert (request.data, request.column) == ("texts.parquet", "text")
    assert (request.context, request.stride, request.max_rows) == (512, 128, 7)
    assert request.settings == {"engine.max_num_seqs": 2, "engine.options.enforce_eager": True}
    assert (request.dtype, request.top_k) == ("bfloat16", None)


def test_a_reference_and_what_is_compared_with_it_keep_likely_tokens(tmp_path: Path) -> None:
    text = "reference: a\ntop_k: 9\nentries: [{model: a}, {model: b}]"
    reference, other = planned(tmp_path, text)
    assert (reference.reference, other.reference) == (None, "a")
    assert reference.request.top_k == other.request.top_k == 9


def test_each_family_may_have_its_own_reference(tmp_path: Path) -> None:
    text = "entries: [{model: a}, {model: b, reference: a}, {model: c}]"
    assert [plan.request.top_k for plan in planned(tmp_path, text)] == [32, 32, None]


def test_json_is_a_spec_too(tmp_path: Path) -> None:
    data = {"stride": 8, "context": 16, "entries": [{"model": "a", "formats": ["bf16"]}]}
    for indent in (None, 2, "\t"):
        (plan,) = planned(tmp_path, json.dumps(data, indent=indent), "spec.json")
        assert (plan.label, plan.request.stride) == ("a bf16", 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "spec.yaml: the spec is empty"),
        ("entries: []", "spec.yaml:1: entries: must not be empty"),
        ("- a", "spec.yaml: must be a mapping"),
        ("data: wikitext2", "spec.yaml: entries: is missing"),
        (
            "refrence: a\nentries: [{model: a}]",
            "spec.yaml:1: refrence: unknown key; did you mean reference?",
        ),
        (
            "entries:\n  - model: a\n    quantisation: int8",
            "spec.yaml:3: entries.0.quantisation: unknown key; did you mean "
            "entries.0.quantization?",
        ),
        (
            "entries:\n  - model: a\n  - model: b/a",
            "spec.yaml:3: entries.1: 'a' is the label of two entries",
        ),
        (
            "entries:\n  - {model: a, formats: [int8, int8]}",
            "spec.yaml:2: entries.0: 'a int8' is the label of two entries",
        ),
        (
            "reference: fp32\nentries: [{model: a}]",
            "spec.yaml:1: reference: no entry is called 'fp32'; there are 'a'",
        ),
        (
            "entries:\n  - model: a\n    reference: fp32",
            "spec.yaml:3: entries.0.reference: no entry is called 'fp32'",
        ),
        (
            "reference: a\nentries: [{model: a, reference: b}, {model: b}]",
            "'a' is a reference and has one itself, 'b'",
        ),
        (
            "entries: [{model: a, formats: [int8], label: b}]",
            "entries.0.label: one label for several formats",
        ),
        (
            "entries: [{model: a, formats: [int8], quantization: int4}]",
            "entries.0.quantization: give it or formats, not both",
        ),
        ("entries: [{model: a, formats: [w8a8]}]", "write int8, the name for it here"),
        ("entries: [{model: a, engine: llama}]", "entries.0.engine: must be"),
        (
            "context: 8\nstride: 8\nentries: [{model: a}]",
            "spec.yaml:2: stride: 8 must be less than the context 8",
        ),
        (
            "entries: [{model: a, settings: {model.dtype: float32}}]",
            "settings: model.dtype: an entry has its own key for it: dtype",
        ),
        (
            "entries: [{model: a, settings: {engine: {max_num_seqs: 4}}}]",
            "engine is not a setting that an entry may have: give dotted keys",
        ),
        ("settings: {score.context: 3}\nentries: [{model: a}]", "score.context is not a setting"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        planned(tmp_path, text)
    assert message in str(raised.value).replace(f"{tmp_path}/", "")
    assert len(str(raised.value).splitlines()) == 1


def test_all_mistakes_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        planned(tmp_path, "stride: 0\nentries: [{model: 7}, {modle: a}]")
    assert len(str(raised.value).splitlines()) == 4  # modle is unknown, and model is missing


def test_a_spec_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such spec"):
        read_spec(tmp_path / "none.yaml")


def test_filter_chooses_labels_by_glob(tmp_path: Path) -> None:
    found = planned(tmp_path, "entries: [{model: a, formats: [fp32, int8, int4]}]")
    assert [plan.label for plan in choose(found, ["*int*"])] == ["a int8", "a int4"]
    assert [plan.label for plan in choose(found, ["a fp32", "*4"])] == ["a fp32", "a int4"]
    assert choose(found, []) == found
    with pytest.raises(ConfigError, match=r"--filter int\* matches no label; there are 'a fp32'"):
        choose(found, ["int*"])


def test_filter_takes_a_label_that_looks_like_a_glob_by_its_name(tmp_path: Path) -> None:
    found = planned(tmp_path, "entries: [{model: a, label: 'x[1]'}, {model: a, label: x1}]")
    assert [plan.label for plan in choose(found, ["x[1]"])] == ["x[1]", "x1"]


@pytest.mark.parametrize("key", ["label", "family", "title"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a\x1b[31mred", "has U+001B at character 2"),
        ("two\nlines", "must be one line"),
        ("turned\u202earound", "has U+202E"),
        ("no\ufffecharacter", "has U+FFFE"),
        ("half \ud800", "has U+D800"),
        ("  ", "must not be blank"),
        ("a ", "must not begin or end with a space"),
    ],
)
def test_a_name_is_a_line_of_text(tmp_path: Path, key: str, name: str, message: str) -> None:
    entry = {"model": "m"} | ({} if key == "title" else {key: name})
    spec = {"entries": [entry]} | ({key: name} if key == "title" else {})
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, json.dumps(spec, indent=1), "spec.json")
    assert message in str(caught.value)
    assert f"spec.json:{7 if key == 'title' else 5}" in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_folder_whose_name_is_not_one_line_of_text_needs_a_family(tmp_path: Path) -> None:
    entry = {"model": "models/a\x1bb"}
    with pytest.raises(ConfigError, match=r"model: its name .* has U\+001B .*: give a family"):
        planned(tmp_path, json.dumps({"entries": [entry]}), "spec.json")
    assert planned(tmp_path, json.dumps({"entries": [entry | {"family": "f"}]}), "spec.json")


def test_the_worked_comparison_has_one_set_of_models_and_a_text_that_calibrated_none() -> None:
    specs = [
        read_spec(ROOT / "jobs" / "compare" / name) for name in ("demo.yaml", "descriptions.yaml")
    ]
    assert specs[0].entries == specs[1].entries
    commands = (ROOT / "docs" / "evaluation.md").read_text()
    globs = set(re.findall(r"--calibration '(.+?)'", commands))
    assert globs == {"jobs/demo/prompts/prompts-0000[0-2]*.parquet"}
    assert not any(fnmatchcase(specs[1].data, glob) for glob in globs)
