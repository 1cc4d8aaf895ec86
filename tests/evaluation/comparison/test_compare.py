"""`batchinfer compare` on the fake engine: processes, resume, cache, failures, exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

from tests.support.jobs import MODEL, Ended, kill, start, wait, wait_until

pytestmark = pytest.mark.slow

#: Settings with which a window becomes durable soon after it is computed.
OFTEN = {"checkpoint.every_rows": 2, "checkpoint.every_s": 0.1, "packing.deduplicate": False}


@dataclass
class Bench:
    """A spec over a small text, and the log of what the fake engine was asked."""

    folder: Path
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def write(self, **changes: Any) -> Path:
        text = self.folder / "text.txt"
        text.write_text("".join(f"line {n} of a text, {n * n} words\n" for n in range(60)))
        spec = {
            "data": str(text),
            "context": 32,
            "stride": 8,
            "settings": OFTEN,
            "entries": [{"model": str(MODEL), "family": "demo", "formats": ["fp32", "bf16"]}],
        }
        path = self.folder / "spec.yaml"
        path.write_text(yaml.safe_dump(spec | changes))
        return path

    def begin(self, path: Path, *arguments: str, **fake: Any) -> Any:
        plan = {"log_file": str(self.folder / "asked"), "max_num_seqs": 2} | fake
        asked = (path, "--out", str(self.out), *arguments)
        return start(*asked, command=("compare",), fake=plan, spares=(4,))

    def compare(self, path: Path, *arguments: str, **fake: Any) -> Ended:
        return wait(self.begin(path, *arguments, **fake), 280)

    def asked(self) -> list[str]:
        """A line for each window that the engine was asked for, since the last call of this."""
        log = self.folder / "asked"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    def records(self) -> list[dict[str, Any]]:
        """Of the last comparison, whole or filtered."""
        files = [*self.out.glob("results.json"), *self.out.glob("filtered-*/results.json")]
        return json.loads(max(files, key=lambda f: f.stat().st_mtime_ns).read_text())["records"]

    def numbers(self) -> list[dict[str, Any]]:
        """What two runs have to agree on."""
        return [{**record, "tokens_per_s": None} for record in self.records()]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_each_entry_is_a_row(bench: Bench) -> None:
    ended = bench.compare(bench.write(title="Demo"))
    assert ended.code == 0, ended.stderr
    *lines, settings = ended.stdout.splitlines()
    assert [line[:9] for line in lines] == ["entry    ", "demo fp32", "demo bf16"]
    assert settings.startswith("settings: checkpoint.every_rows=2, ")
    fp32, bf16 = bench.records()
    assert fp32["perplexity"] == bf16["perplexity"] > 1  # the fake has no precision
    assert (fp32["family"], fp32["context"], fp32["stride"]) == ("demo", 32, 8)
    table = pl.read_parquet(bench.out / "results.parquet")
    assert table["label"].to_list() == ["demo fp32", "demo bf16"]
    page = (bench.out / "comparison.html").read_text()
    assert "<title>Demo</title>" in page and "demo bf16" in page


def test_what_an_entry_warns_of_is_shown_under_its_label(bench: Bench) -> None:
    """Not only in its log, which nobody opens of an entry that succeeded."""
    text = bench.folder / "rows.parquet"
    pl.DataFrame({"t": ["one two three " * 20, "", None]}).write_parquet(text)
    entries = [{"model": str(MODEL), "label": "a"}]
    ended = bench.compare(bench.write(data=str(text), column="t", entries=entries))
    assert ended.code == 0, ended.stderr
    for _ in range(2):  # with figures that are kept, too
        assert "warning: a: the data" in ended.stderr
        assert "2 of 3 rows that were read have no text" in ended.stderr
        ended = bench.compare(bench.folder / "spec.yaml")
    assert "kept from before" in ended.stderr


def test_what_is_finished_is_kept(bench: Bench) -> None:
    """A second run computes nothing; --clear-cache computes all, to the same numbers."""
    path = bench.write()
    bench.compare(path)
    first, asked = bench.records(), bench.asked()
    assert len(asked) == 2 * first[0]["windows"]
    again = bench.compare(path)
    assert again.code == 0
    assert "kept from before" in again.stderr
    assert (bench.records(), bench.asked()) == (first, [])
    numbers = bench.numbers()
    bench.compare(path, "--clear-cache")
    assert bench.numbers() == numbers
    assert sorted(bench.asked()) == sorted(asked)


def test_a_name_is_not_part_of_the_content(bench: Bench) -> None:
    """Another label and family find what was computed; another text and other settings do not."""
    entry = {"model": str(MODEL), "quantization": "fp32"}
    bench.compare(bench.write(entries=[entry | {"label": "a"}]))
    assert bench.asked()
    bench.compare(bench.write(entries=[entry | {"label": "b", "family": "f"}]))
    assert not bench.asked()
    assert (bench.records()[0]["label"], bench.records()[0]["family"]) == ("b", "f")
    bench.compare(bench.write(entries=[entry], stride=16))
    assert bench.asked()


def test_a_model_that_was_made_again_is_measured_again(bench: Bench) -> None:
    """Also where its files look the same: only the weights' numbers are others."""
    model = bench.folder / "model"
    shutil.copytree(MODEL, model)
    path = bench.write(entries=[{"model": str(model), "quantization": "fp32"}])
    bench.compare(path)
    assert bench.asked()
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    bench.compare(path)
    assert bench.asked()


def test_no_comparison_takes_an_entry_from_another(bench: Bench) -> None:
    """It is refused before anything is deleted, and the other's files stay as they are."""
    path = bench.write(reference="demo fp32")
    assert bench.compare(path, "--filter", "*fp32").code == 0
    numbers, results = bench.numbers(), results_of(bench.out)
    first = bench.begin(path, step_s=0.5)
    wait_until(lambda: len([*bench.out.glob("entries/*/log.txt")]) == 2, 120, "the second entry")
    held = sorted(bench.out.glob("entries/*"))
    for arguments in (("--clear-cache",), ()):
        second = bench.compare(path, *arguments)
        assert second.code == 75
        assert "in use by another comparison that runs now" in second.stderr
    assert sorted(bench.out.glob("entries/*")) == held
    assert results_of(bench.out) == results
    beside = bench.compare(path, "--filter", "*fp32")  # a finished reference is for all to read
    assert (beside.code, bench.numbers()) == (0, numbers)
    assert bench.compare(path, "--filter", "*fp32", "--clear-cache").code == 75
    assert wait(first, 280).code == 0
    assert [record["error"] for record in bench.records()] == [None, None]


def results_of(out: Path) -> dict[str, bytes]:
    files = [*out.glob("*.*"), *out.glob("filtered-*/*")]
    return {str(path): path.read_bytes() for path in files}


def ids(work: Path) -> set[int]:
    """Of the windows whose result is in a file, while a run may be folding its parts."""
    while True:
        try:
            files = [*work.glob("output/*.parquet"), *work.rglob("*.part")]
            return {n for file in files for n in pl.read_parquet(file)["id"].to_list()}
        except FileNotFoundError:
            continue


def durable(out: Path) -> list[int]:
    """A number for each window whose result is in a file, as the engine logs what it is asked."""
    found = []
    for work in out.glob("entries/*/work"):
        if not (done := ids(work)):
            continue
        windows = pl.concat(map(pl.read_parquet, work.glob("windows/*/*.parquet")))
        for row in windows.filter(pl.col("window").is_in(done)).iter_rows(named=True):
            prompt = row["given_token_ids"] + row["scored_token_ids"]
            found.append(zlib.crc32(np.array(prompt, np.int32).tobytes()))
    return found


@pytest.mark.parametrize("whom", ["the command alone", "its whole process group"])
def test_killed_and_started_again_no_finished_window_is_computed_twice(
    bench: Bench, whom: str
) -> None:
    """Killed in the first entry and in the second, with SIGKILL, in the middle of its windows."""
    path = bench.write()
    bench.compare(path)
    numbers = bench.numbers()
    windows = bench.records()[0]["windows"]
    shutil.rmtree(bench.out)
    bench.asked()
    for at_least in (windows // 3, windows + windows // 3):
        process = bench.begin(path, step_s=0.05)
        wait_until(lambda n=at_least: len(durable(bench.out)) >= n, 120, "half of the windows")
        if whom == "the command alone":
            os.kill(process.pid, signal.SIGKILL)
            wait(process)
            wait_until(lambda: not children(bench.out), 60, "the end of the entry's process")
        else:
            kill(process)
            wait(process)
        finished = Counter(durable(bench.out))
        bench.asked()
    ended = bench.compare(path)
    assert ended.code == 0, ended.stderr
    assert bench.numbers() == numbers
    computed = Counter(map(int, bench.asked()))
    assert finished.total() + computed.total() == 2 * windows
    assert finished + computed == Counter({crc: 2 * n for crc, n in one_of_each(bench).items()})


def one_of_each(bench: Bench) -> Counter[int]:
    both = Counter(durable(bench.out))
    return Counter({crc: n // 2 for crc, n in both.items()})


def children(out: Path) -> list[str]:
    """The processes of entries of this output."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(out).encode() in (folder / "cmdline").read_bytes():
                found.append(folder.name)
        except OSError:
            continue
    return found


def test_a_model_that_fails_is_a_row_and_the_others_are_measured(bench: Bench) -> None:
    damaged = bench.folder / "damaged"
    shutil.copytree(MODEL, damaged)
    (damaged / "config.json").write_text("{")
    entries = [{"model": str(damaged)}, {"model": str(MODEL), "quantization": "fp32"}]
    ended = bench.compare(bench.write(entries=entries))
    assert ended.code == 3
    assert "1 of 2 entries failed: damaged" in ended.stderr
    broken, whole = bench.records()
    assert "config.json is not valid JSON" in broken["error"]
    assert broken["perplexity"] is None
    assert whole["error"] is None and whole["perplexity"] > 1
    assert any(
        line.startswith("damaged") and "failed: " in line for line in ended.stdout.split("\n")
    )


def test_a_quantization_that_does_not_run_here_is_a_row(bench: Bench) -> None:
    entry = {"model": str(MODEL), "family": "demo", "formats": ["awq", "fp32"]}
    ended = bench.compare(bench.write(entries=[entry]))
    assert ended.code == 3
    assert "awq" in bench.records()[0]["error"]
    assert bench.records()[1]["error"] is None


def test_a_process_that_dies_of_a_signal_is_a_row_and_worth_another_start(bench: Bench) -> None:
    """As the kernel ends it when memory runs out. The next start goes on where it died."""
    path = bench.write()
    ended = bench.compare(path, kill_at_step=30, step_s=0.05)
    assert ended.code == 75
    assert "2 of 2 entries failed: demo fp32, demo bf16 (start again" in ended.stderr
    assert {record["error"].partition(",")[0] for record in bench.records()} == {
        "its process was ended by SIGKILL"
    }
    bench.asked()
    assert bench.compare(path).code == 0
    assert len(bench.asked()) < 2 * bench.records()[0]["windows"]


def test_a_comparison_that_is_interrupted_says_what_it_keeps(bench: Bench) -> None:
    process = bench.begin(bench.write(), step_s=0.2)
    wait_until(lambda: durable(bench.out), 120, "a window")
    os.kill(process.pid, signal.SIGINT)
    ended = wait(process, 120)
    assert ended.code == 130
    assert f"stopped: finished windows are kept in {bench.out}; start again" in ended.stderr
    wait_until(lambda: not children(bench.out), 60, "the end of the entry's process")


def test_a_plot_of_nothing_is_said(bench: Bench) -> None:
    damaged = bench.folder / "damaged"
    shutil.copytree(MODEL, damaged)
    (damaged / "config.json").write_text("{")
    ended = bench.compare(bench.write(entries=[{"model": str(damaged)}]), "-p")
    assert ended.code == 3
    assert "warning: no plot was written: nothing to plot" in ended.stderr


def test_a_process_that_ends_without_an_answer_says_its_last_words(bench: Bench) -> None:
    path = bench.write(entries=[{"model": str(MODEL), "quantization": "fp32"}])
    ended = bench.compare(path, max_num_seqs="a bug")
    assert ended.code == 3
    assert "its process ended with exit code 1" in bench.records()[0]["error"]
    assert "TypeError" in bench.records()[0]["error"]


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        (
            {"entries": [{"model": "nowhere"}, {"model": str(MODEL)}, {"model": "nor/here/x"}]},
            (),
            "make that checkpoint first, or leave the entry out with --filter",
        ),
        ({}, ("--filter", "*int8"), "--filter *int8 matches no label"),
        ({"context": 99_999}, (), "spec.yaml: context (demo fp32): the context of 99999 tokens"),
        (
            {"entries": [{"model": str(MODEL), "settings": {"model.lora": "nowhere"}}]},
            (),
            "spec.yaml: entries.0.settings (model): model.lora: there is no folder",
        ),
        ({"data": "no-such.txt"}, (), "no-such.txt: there is no such file"),
        ({"data": str(MODEL), "column": "text"}, (), "the data"),
        ({"data": "x", "reference": "demo fp8"}, (), "no entry is called 'demo fp8'"),
        ({}, ("--out", "s3://bucket/x"), "written to a local folder"),
    ],
)
def test_a_mistake_in_the_spec_ends_immediately(
    bench: Bench, changes: dict[str, Any], arguments: tuple[str, ...], message: str
) -> None:
    ended = bench.compare(bench.write(**changes), *arguments)
    assert ended.code == 2
    assert message in ended.stderr
    assert "input.path" not in ended.stderr
    assert not bench.asked()
    assert not (bench.out / "results.json").exists()


def test_a_filter_shows_some_entries(bench: Bench) -> None:
    path = bench.write()
    ended = bench.compare(path, "--filter", "*bf16")
    assert ended.code == 0
    assert [record["label"] for record in bench.records()] == ["demo bf16"]
    assert len(bench.asked()) == bench.records()[0]["windows"]
    assert not (bench.out / "results.json").exists()
    assert bench.compare(path, "-p").code == 0
    whole = results_of(bench.out)
    assert bench.compare(path, "--filter", "*fp32", "-p").code == 0
    assert whole.items() <= results_of(bench.out).items(), "of all entries, as it was"


def test_a_plot_is_drawn_on_request(bench: Bench) -> None:
    ended = bench.compare(bench.write(), "-p", "-v", "--dark", "-t", "A title", "--filter", "*")
    assert ended.code == 0, ended.stderr
    assert {path.name for path in bench.out.glob("perplexity-*")} == {
        "perplexity-memory-dark.svg",
        "perplexity-memory-dark.png",
    }
    assert "<title>A title</title>" in (bench.out / "comparison.html").read_text()


def test_a_plot_of_what_failed_leaves_the_exit_code_to_the_failures(bench: Bench) -> None:
    """The only entry with a reference fails: the rest is written, a warning says what is not."""
    damaged = bench.folder / "damaged"
    shutil.copytree(MODEL, damaged)
    (damaged / "config.json").write_text("{")
    entries = [{"model": str(MODEL)}, {"model": str(damaged)}]
    ended = bench.compare(bench.write(entries=entries, reference="model"), "-p", "-y", "kl")
    assert ended.code == 3
    assert "warning: no plot was written: nothing to plot" in ended.stderr
    written = ended.stderr.partition("\nwritten: ")[2].partition("\n")[0].split(", ")
    assert [Path(file).name for file in written] == ["results.parquet", "comparison.html"]
    assert all(Path(file).exists() for file in written)


def with_other_tokenizer(folder: Path) -> str:
    """A copy of the demo model in which two tokens have each other's ids."""
    model = folder / "other"
    shutil.copytree(MODEL, model)
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = ",", "."
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(tokenizer))
    return str(model)


def test_a_reference_gives_the_others_their_distance_from_it(bench: Bench) -> None:
    """Also where it is not shown, and where it was measured without one before."""
    bench.compare(bench.write())
    bench.compare(bench.write(reference="demo fp32", top_k=3))
    fp32, bf16 = bench.records()
    assert (fp32["kl"], fp32["reference"]) == (None, None)
    assert (bf16["kl"], bf16["kl_top_k"], bf16["reference"]) == (0.0, 3, "demo fp32")
    assert bf16["top1_agreement"] == 1.0
    bench.asked()
    entry = {"model": str(MODEL)}
    renamed = [entry | {"quantization": "fp32", "label": "the base"}]
    renamed.append(entry | {"quantization": "bf16", "label": "bf16"})
    ended = bench.compare(bench.write(reference="the base", top_k=3, entries=renamed))
    assert [record["reference"] for record in bench.records()] == [None, "the base"]
    assert "KL: divergence from the base, k = 3, nats per token" in ended.stdout
    assert not bench.asked()
    shutil.rmtree(bench.out)
    bench.compare(bench.write(reference="demo fp32", top_k=3), "--filter", "*bf16")
    assert [record["kl"] for record in bench.records()] == [0.0]


def test_a_reference_whose_output_was_deleted_is_computed_again_once_it_is_needed(
    bench: Bench,
) -> None:
    bench.compare(bench.write(reference="demo fp32", top_k=3), "--filter", "*fp32")
    (output,) = bench.out.glob("entries/*/*/output")
    shutil.rmtree(output)
    bench.asked()
    ended = bench.compare(bench.write(reference="demo fp32", top_k=3))
    assert ended.code == 0, ended.stderr
    assert (bench.records()[1]["kl"], len(bench.asked())) == (0, 2 * bench.records()[0]["windows"])
    shutil.rmtree(output)
    assert bench.compare(bench.write(reference="demo fp32", top_k=3)).code == 0
    assert not bench.asked(), "all figures are there"


def test_a_text_of_the_same_size_and_time_is_another(bench: Bench) -> None:
    """In a folder of Parquet files."""
    folder = bench.folder / "texts"
    folder.mkdir()
    file = folder / "a.parquet"
    entries = [{"model": str(MODEL)}]
    sizes = set()
    for word in ("one two three ", "two one three "):
        pl.DataFrame({"t": [word * 20]}).write_parquet(file, compression="uncompressed")
        os.utime(file, (1e9, 1e9))
        sizes.add(file.stat().st_size)
        bench.compare(bench.write(data=str(folder), column="t", entries=entries))
        assert bench.asked()
    assert len(sizes) == 1


def test_a_tokenizer_that_differs_from_the_references_is_refused(bench: Bench) -> None:
    entries = [{"model": str(MODEL)}, {"model": with_other_tokenizer(bench.folder)}]
    ended = bench.compare(bench.write(entries=entries, reference="model"))
    assert ended.code == 3
    assert "has another tokenizer than" in bench.records()[1]["error"]
    assert bench.records()[0]["error"] is None


def test_without_a_reference_other_tokenizers_are_warned_of(bench: Bench) -> None:
    entries = [{"model": str(MODEL)}, {"model": with_other_tokenizer(bench.folder)}]
    ended = bench.compare(bench.write(entries=entries))
    assert ended.code == 0
    assert "model and other have other tokenizers" in ended.stderr
    assert "bits per byte" in ended.stderr


def test_without_its_reference_an_entry_has_a_perplexity(bench: Bench) -> None:
    damaged = bench.folder / "damaged"
    shutil.copytree(MODEL, damaged)
    (damaged / "model.safetensors").write_bytes(b"")
    entries = [{"model": str(damaged)}, {"model": str(MODEL)}]
    ended = bench.compare(bench.write(entries=entries, reference="damaged"))
    assert ended.code == 3
    assert "model: no KL divergence, as its reference damaged failed" in ended.stderr
    assert bench.records()[1]["perplexity"] > 1
    assert bench.records()[1]["kl"] is None
