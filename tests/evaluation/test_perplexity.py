"""Perplexity through a score job: resume, the sums, and what cannot be measured."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import batchinfer
from batchinfer.errors import ConfigError, EngineDied, InputError
from batchinfer.evaluation import PerplexityRequest, Record
from batchinfer.evaluation.figures import ScoredRows, mean_nll
from batchinfer.evaluation.intervals import ratio_interval
from batchinfer.evaluation.outputs import read_output
from batchinfer.evaluation.perplexity import measure, prepare
from batchinfer.testing.demands import completion as engine
from tests.evaluation.conftest import on_fake
from tests.support.jobs import MODEL, run


def request(text: Path, **changes: Any) -> PerplexityRequest:
    asked = {"label": "a b", "model": str(MODEL), "data": str(text), "context": 16, "stride": 4}
    return PerplexityRequest(**{**asked, **changes})


@pytest.mark.usefixtures("fake")
def test_a_record_is_the_sum_over_the_windows_of_the_output(text: Path, tmp_path: Path) -> None:
    record = measure(request(text), work=tmp_path / "work")
    rows = batchinfer.scan(tmp_path / "work/output").collect()
    assert rows.height == record.windows
    assert record.tokens == rows["num_scored_tokens"].sum()
    logprobs = np.array(rows["token_logprobs"].explode(), np.float64)
    assert record.nll == pytest.approx(-math.fsum(logprobs) / len(logprobs), rel=1e-12)
    assert record.perplexity == math.exp(record.nll or 0)
    assert (record.perplexity_low or 0) <= record.perplexity <= (record.perplexity_high or 0)
    assert record.bytes_of_text == rows["num_bytes"].sum()
    total_bytes = len(text.read_bytes())
    assert 0 < total_bytes - (record.bytes_of_text or 0) < 8  # the first token is not scored
    assert (record.layer_bits_per_weight, record.head_bits_per_weight) == (16, 16)
    assert Record.model_validate_json((tmp_path / "work/record.json").read_text()) == record


@pytest.mark.usefixtures("fake")
def test_the_record_says_with_which_settings_it_was_measured(text: Path, tmp_path: Path) -> None:
    settings = {"model.max_model_len": 1024, "engine.max_num_seqs": 8}
    record = measure(request(text, settings=settings), work=tmp_path / "a")
    assert record.settings == "engine.max_num_seqs=8, model.max_model_len=1024"
    assert measure(request(text), work=tmp_path / "b").settings is None


@pytest.mark.usefixtures("fake")
def test_that_one_window_has_no_interval_is_said(
    text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = measure(request(text, max_rows=1), work=tmp_path / "work")
    assert (record.windows, record.perplexity_low) == (1, None)
    assert "one window only, so the perplexity has no interval" in caplog.text


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model."""
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def change_a_weight(model: Path) -> None:
    """In place: size and time stay, as of a file that was copied over with its times."""
    file = model / "model.safetensors"
    was = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)[0]
        stream.seek(-1, 2)
        stream.write(bytes([last ^ 1]))
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))


@pytest.mark.parametrize("steps", [20, None], ids=["part-way", "finished"])
def test_weights_that_changed_are_not_counted_as_those_before(
    text: Path, tmp_path: Path, model: Path, steps: int | None
) -> None:
    settings = {"checkpoint.every_rows": 4, "packing.batch_rows": 2, "packing.deduplicate": False}
    asked = request(text, model=str(model), settings=settings)
    work = tmp_path / "work"
    with on_fake(max_num_seqs=2, die_at_step=steps), suppress(EngineDied):
        measure(asked, work=work)
    change_a_weight(model)
    with on_fake():
        with pytest.raises(ConfigError, match=r"model\.safetensors changed since.*--restart"):
            measure(asked, work=work)
        again = measure(asked, work=work, restart=True)
        assert measure(asked, work=work) == again
    status = sorted(work.glob("output/_batchinfer/status/*.json"))[-1]
    assert json.loads(status.read_text())["rows_computed"] == again.windows


@pytest.mark.usefixtures("fake")
def test_a_measurement_without_its_own_folder_finds_only_equal_content(
    text: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = request(text, model=str(model))
    first = prepare(asked)
    first.compute()
    assert prepare(asked).is_finished
    change_a_weight(model)
    assert not prepare(asked).is_finished
    shutil.rmtree(model)
    shutil.copytree(MODEL, model)
    assert prepare(asked).work == first.work
    text.write_text("another text, of other words and as many of them as are needed " * 8)
    assert not prepare(asked).is_finished
    assert len(list(tmp_path.glob("out/measured/*"))) == 1, "to look writes nothing"


@pytest.mark.usefixtures("fake")
def test_the_windows_can_be_cut_short(text: Path, tmp_path: Path) -> None:
    whole = measure(request(text), work=tmp_path / "whole")
    part = measure(request(text, max_rows=5), work=tmp_path / "part")
    assert part.windows == 5 < (whole.windows or 0)
    first = batchinfer.scan(tmp_path / "whole/output").head(5).collect()
    assert part.tokens == first["num_scored_tokens"].sum() == 15 + 4 * 4
    assert part.nll == pytest.approx(-first["cumulative_logprob"].sum() / (part.tokens or 0))


def test_a_measurement_that_died_continues_and_computes_no_window_twice(
    text: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    settings = {"checkpoint.every_rows": 4, "packing.batch_rows": 2, "packing.deduplicate": False}
    asked = request(text, settings=settings)
    work = tmp_path / "work"
    with on_fake(max_num_seqs=2, log_file=str(log), die_at_step=20), pytest.raises(EngineDied):
        measure(asked, work=work)
    begun = len(log.read_text().splitlines())
    with on_fake(max_num_seqs=2, log_file=str(log)):
        record = measure(asked, work=work)
    computed = len(log.read_text().splitlines())
    assert begun > 4
    assert record.windows is not None
    assert record.windows <= computed <= record.windows + 4 + 2  # those in flight
    with on_fake(log_file=str(log)):
        again = measure(asked, work=work)
    assert again == record
    assert len(log.read_text().splitlines()) == computed
    with on_fake():
        other = measure(asked, work=tmp_path / "other")
    assert other.model_copy(update={"tokens_per_s": None}) == record.model_copy(
        update={"tokens_per_s": None}
    )


@pytest.mark.usefixtures("fake")
def test_one_window_has_no_interval(text: Path, tmp_path: Path) -> None:
    record = measure(request(text, max_rows=1), work=tmp_path / "work")
    assert record.windows == 1
    assert (record.perplexity_low, record.perplexity_high) == (None, None)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"context": 4096}, "context of 4096 tokens is more than the 2048 that"),
        ({"stride": 16}, "stride of 16 tokens must be less than the context of 16"),
        ({"model": "no/such/folder/"}, "there is no folder"),
        ({"quantization": "int5"}, "quantization"),
        ({"settings": {"sampling.max_tokens": 4}}, "sections model, engine, packing"),
        ({"settings": {"model.path": str(MODEL)}}, "model.path: .* use the argument MODEL"),
        ({"settings": {"model": {"path": str(MODEL)}}}, "give dotted keys"),
        ({"settings": {"model.quantization": "fp32"}}, "use --quantization"),
        ({"settings": {"score.context": 8}}, "score.context: .* use --context"),
        ({"settings": {"score.stride": 2}}, "use --stride"),
        ({"settings": {"score.completion_column": "x"}}, "give dotted keys"),
        ({"settings": {"input.filter": "window < 3"}}, "input.filter: .* use --data"),
        ({"settings": {"input.keep_columns": []}}, "use --data"),
        ({"settings": {"output.path": "elsewhere"}}, "output.path: .* use --work"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_computed(
    changes: dict[str, Any], problem: str, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=problem):
        measure(request(text, **changes), work=tmp_path / "work")
    assert not (tmp_path / "work/output").exists()


@pytest.mark.usefixtures("fake")
def test_an_empty_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match=r"empty\.txt is empty"):
        measure(request(tmp_path / "empty.txt"), work=tmp_path / "work")


@pytest.mark.usefixtures("fake")
def test_a_tokenizer_with_tokens_that_the_model_lacks_is_refused(
    text: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ConfigError, match="has a vocabulary of 300: they do not belong together"):
        measure(request(text, model=str(model)), work=tmp_path / "work")


@pytest.mark.parametrize("bad", [math.nan, -math.inf, 0.5])
def test_a_nan_logprob_fails_the_measurement_and_can_be_recomputed(
    bad: float, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logprobs = engine.prompt_logprobs

    def with_bad(ids: Any) -> Any:
        found = logprobs(ids).copy()
        found[-1] = bad
        return found

    with on_fake():
        with monkeypatch.context() as patch:
            patch.setattr(engine, "prompt_logprobs", with_bad)
            with pytest.raises(
                InputError, match=r"rows of .*output failed, such as row 0 .*(nan|inf|0\.5)"
            ):
                measure(request(text), work=tmp_path / "work")
        assert measure(request(text), work=tmp_path / "work").perplexity


@pytest.mark.parametrize("nll", [1e9, -1.0])
def test_a_mean_that_is_not_a_perplexity_is_refused(nll: float) -> None:
    totals = ScoredRows(np.array([nll]), np.array([2.0]), np.array([4.0]))
    with pytest.raises(ConfigError, match="no working model has"):
        mean_nll(totals, "x")


def test_the_interval_is_of_the_windows_and_the_same_each_time() -> None:
    rng = np.random.default_rng(0)
    nll, tokens = rng.normal(300, 10, 400), np.full(400, 100.0)
    low, high = ratio_interval(nll, tokens) or (0, 0)
    assert (low, high) == ratio_interval(nll, tokens)
    assert low < nll.sum() / tokens.sum() < high
    assert high - low == pytest.approx(2 * 1.96 * 0.1 / math.sqrt(400), rel=0.1)
    assert ratio_interval(np.ones(2), np.ones(2)) == (1, 1)


def test_entries_without_weight_are_in_no_draw_of_the_interval() -> None:
    """A draw of nothing but them would be 0 / 0."""
    assert ratio_interval(np.array([3.0, 4, 0, 0]), np.array([1.0, 2, 0, 0])) == ratio_interval(
        np.array([3.0, 4]), np.array([1.0, 2])
    )
    assert ratio_interval(np.array([3.0, 0, 0]), np.array([1.0, 0, 0])) is None


@pytest.mark.usefixtures("fake")
def test_an_output_that_is_not_whole_is_not_read(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not an output of batchinfer"):
        read_output(str(tmp_path))
    measure(request(text), work=tmp_path / "work")
    (tmp_path / "work/output/_SUCCESS").unlink()
    with pytest.raises(ConfigError, match="is not complete"):
        read_output(str(tmp_path / "work/output"))


def test_the_command_prints_the_record_and_only_that(text: Path, tmp_path: Path) -> None:
    work = str(tmp_path / "work")
    options = ["--data", str(text), "--context", "16", "--stride", "4", "--work", work]
    ended = run(str(MODEL), *options, "--layers", command=("perplexity",))
    assert ended.code == 0, ended.stderr
    record = Record.model_validate_json(ended.stdout)
    assert record.label == "model auto"
    assert "model.layers.0-5.mlp.up_proj" in ended.stderr
    assert "computing in" in ended.stderr
    again = run(str(MODEL), *options, command=("perplexity",), fake={"kill_at_step": 1})
    assert again.stdout == ended.stdout  # nothing was computed
    assert "computing" not in again.stderr


def test_a_measurement_that_was_killed_continues(text: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    options = ["--data", str(text), "--context", "16", "--stride", "4", "--work", str(work)]
    options += ["--set", "checkpoint.every_rows=4", "--set", "packing.batch_rows=2"]
    options += ["--set", "packing.deduplicate=false"]
    fake = {"max_num_seqs": 2, "kill_at_step": 14, "step_s": 0.05}
    killed = run(str(MODEL), *options, command=("perplexity",), fake=fake)
    assert killed.code == -signal.SIGKILL
    parts = list(work.glob("output/_batchinfer/parts/**/*.part"))
    done = sum(pl.read_parquet(part).height for part in parts)
    assert done
    ended = run(str(MODEL), *options, command=("perplexity",))
    assert ended.code == 0, ended.stderr
    record = Record.model_validate_json(ended.stdout)
    last = json.loads(sorted(work.glob("output/_batchinfer/status/*.json"))[-1].read_text())
    assert last["rows_computed"] == (record.windows or 0) - done
    assert [path.stem for path in work.glob("windows/*/*.parquet")] == [
        (record.data_digest or "")[:16]
    ]
