"""Starting again: what is done stays, what is missing is computed, what does not fit is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import polars as pl
import pytest

from tests.support.endings import must_fail
from tests.support.in_process import run_here
from tests.support.jobs import (
    MODEL,
    SLOW,
    Place,
    job,
    kill,
    results,
    rows,
    run,
    stable,
    start,
    wait,
    wait_until,
    write_job,
)


def test_a_finished_output_is_recognised_without_building_an_engine(
    folder: Place, two_shards: Path
) -> None:
    first = run(two_shards)
    assert (first.code, first.result["status"], first.result["rows"]) == (0, "complete", 200)
    again = run(two_shards, fake={"fail_build": "the engine was built"})
    assert again.code == 0, again.stderr
    assert again.result["rows"] == 200
    assert again.result["rows_computed"] == 0


def change_the_weights(model: Path) -> None:
    """As training does: to as many bytes, everywhere; with the times of the old file."""
    file = model / "model.safetensors"
    times, content = file.stat(), bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = bytes(byte ^ 1 for byte in content[start:])
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("limit", [(), ("--limit", "70")], ids=["complete", "begun"])
def test_results_of_two_sets_of_weights_are_not_mixed(
    folder: Place, two_shards: Path, tmp_path: Path, limit: tuple[str, ...]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    at = ("--set", f"model.path={model}")
    assert run(two_shards, *at, *limit).code == 0
    elsewhere = shutil.copytree(model, tmp_path / "copy", copy_function=shutil.copy)
    assert run(two_shards, "--set", f"model.path={elsewhere}", *limit).code == 0
    before = {name: Path(folder.url("out", name)).read_bytes() for name in folder.names("out")}
    change_the_weights(model)
    refused = run(two_shards, *at)
    must_fail(refused, 2, f"{model}/model.safetensors holds other weights", "--restart")
    assert before.keys() <= set(folder.names("out"))
    again = run(two_shards, *at, "--restart")
    assert (again.code, again.result["rows_computed"]) == (0, 200), again.stderr
    assert run(two_shards, *at).code == 0


def test_an_output_of_a_version_that_did_not_mark_weights_is_resumed_with_any(
    folder: Place, two_shards: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    at = ("--set", f"model.path={model}")
    assert run(two_shards, *at, "--limit", "70").code == 0
    path = Path(folder.url("out/_batchinfer/job.json"))
    record = json.loads(path.read_text())
    del record["weights"]
    path.write_text(json.dumps(record))
    change_the_weights(model)
    assert run(two_shards, *at).code == 0


def test_a_limit_ends_cleanly_and_the_next_start_continues(folder: Place, two_shards: Path) -> None:
    limited = run(two_shards, "--limit", "70")
    assert limited.code == 0
    assert (limited.result["status"], limited.result["rows"]) == ("partial", 70)
    assert "_SUCCESS" not in folder.names("out")
    rest = run(two_shards)
    assert (rest.result["status"], rest.result["rows_computed"]) == ("complete", 130)
    assert results(folder)["row"].to_list() == [*range(150), *range(50)]


def test_max_seconds_stops_cleanly_with_75(folder: Place, tmp_path: Path) -> None:
    folder.write_parquet("in/a.parquet", rows(300))
    path = write_job(tmp_path, job(folder, limits={"max_seconds": 4}))
    stopped = run(path, fake={**SLOW, "step_s": 0.1})
    assert stopped.code == 75, stopped.stderr
    assert "max_seconds" in stopped.stderr
    assert run(path, "--set", "limits.max_seconds=null").code == 0


def test_slices_share_an_output_without_talking_and_the_last_writes_success(
    folder: Place, tmp_path: Path
) -> None:
    for index in range(5):
        folder.write_parquet(f"in/s{index}.parquet", rows(20, start=20 * index))
    path = write_job(tmp_path, job(folder))
    processes = [start(path, "--shard", f"{i}/3", fake={"step_s": 0.02}) for i in (1, 2, 3)]
    ended = [wait(p) for p in processes]
    assert [e.code for e in ended] == [0, 0, 0], [e.stderr for e in ended]
    assert sum(e.result["rows_computed"] for e in ended) == 100
    assert "complete" in {e.result["status"] for e in ended}
    assert "_SUCCESS" in folder.names("out")
    assert results(folder).height == 100


def test_a_whole_run_waits_for_no_slice_but_is_refused(folder: Place, two_shards: Path) -> None:
    slice_run = start(two_shards, "--shard", "1/2", fake=SLOW)
    wait_until(lambda: folder.names("out/_batchinfer/status"), what="the status file")
    refused = run(two_shards)
    assert refused.code == 75
    assert f"pid {slice_run.pid}" in refused.stderr
    kill(slice_run)
    slice_run.communicate()
    assert run(two_shards).code == 0


def test_new_shards_are_computed_and_a_removed_one_keeps_its_results(
    folder: Place, two_shards: Path
) -> None:
    assert run(two_shards).code == 0
    folder.write_parquet("in/c.parquet", rows(10, start=200))
    Path(folder.url("in", "a.parquet")).unlink()
    ended = run(two_shards)
    assert ended.code == 0
    assert ended.result["rows_computed"] == 10
    assert "a.parquet is no longer in the input" in ended.stderr
    assert results(folder).height == 210


def test_a_renamed_input_file_is_computed_again(folder: Place, tmp_path: Path) -> None:
    """An input file under another name is computed again and said to be there twice."""
    for index, name in enumerate(("s/a", "s/b", "c")):
        folder.write_parquet(f"in/{name}.parquet", rows(10, start=10 * index))
    wide = write_job(tmp_path, job(folder, input={"path": folder.url("in")}))
    assert run(wide).result["warnings"] == []
    for _ in range(2):
        narrow = run(wide, "--set", f"input.path={folder.url('in', 's')}")
        assert narrow.code == 0, narrow.stderr
        gone, twice = narrow.result["warnings"]
        assert gone.startswith("c.parquet, s/a.parquet, s/b.parquet are no longer in the input")
        assert "s/a.parquet (now a.parquet), s/b.parquet (now b.parquet)" in twice
        Path(folder.url("out", "_SUCCESS")).unlink()


def test_files_that_look_alike_were_not_renamed(folder: Place, tmp_path: Path) -> None:
    """Each of them had results before the others left the input."""
    for name in "abc":
        folder.write_parquet(f"in/{name}.parquet", rows(10))
    assert run(write_job(tmp_path, job(folder, input={"path": folder.url("in")}))).code == 0
    one = write_job(tmp_path, job(folder, input={"path": folder.url("in", "a.parquet")}))
    ended = run(one)
    assert ended.code == 0, ended.stderr
    (gone,) = ended.result["warnings"]
    assert gone.startswith("b.parquet, c.parquet are no longer in the input")


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_rewritten_file_is_taken_for_a_copy_and_reported(
    folder: Place, tmp_path: Path, is_finished: bool
) -> None:
    folder.write_parquet("in/a.parquet", rows(100))
    path = write_job(tmp_path, job(folder, checkpoint={"every_rows": 1}))
    assert run(path, *([] if is_finished else ["--limit", "30"])).code == 0
    file = Path(folder.url("in", "a.parquet"))
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))
    ended = run(path)
    assert ended.code == 0, ended.stderr
    (said,) = ended.result["warnings"]
    assert said.startswith("a.parquet was rewritten since rows of it were computed")
    assert results(folder).height == 100


def test_of_a_changed_file_alone_the_results_can_be_deleted(
    folder: Place, two_shards: Path
) -> None:
    """As the refusal says."""
    assert run_here(two_shards).code == 0
    folder.write_parquet("in/a.parquet", rows(7, start=500))
    refused = run_here(two_shards)
    assert refused.code == 2 and "delete the files of these names" in refused.message
    Path(folder.url("out", "a.parquet")).unlink()
    assert run_here(two_shards).code == 0
    have = results(folder)
    ids = have.filter(have["shard"] == "a.parquet")["id"].to_list()
    assert ids == [f"row-{number}" for number in range(500, 507)]
    assert have.filter(have["shard"] == "b.parquet")["attempt"].unique().to_list() == [1]


@pytest.mark.parametrize("has_results", [True, False])
def test_a_file_changed_with_equal_size_and_time_is_refused(
    folder: Place, tmp_path: Path, has_results: bool
) -> None:
    """A file changed behind its size and time is not mixed with its old results."""
    for name in ("a", "b"):
        folder.write_parquet(f"in/{name}.parquet", rows(100), compression="uncompressed")
    path = write_job(tmp_path, job(folder, checkpoint={"every_rows": 1}))
    assert run(path, "--limit", "30").code == 0
    changed = Path(folder.url("in", "a.parquet" if has_results else "b.parquet"))
    before, old = changed.stat(), changed.read_bytes()
    other = rows(100).with_columns(text=pl.col("text").str.replace("word", "lord"))
    folder.write_parquet(f"in/{changed.name}", other, compression="uncompressed")
    assert changed.stat().st_size == before.st_size
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    ended = run(path)
    assert ended.code == 2 and f"{changed.name} is not the file" in ended.stderr, ended.stderr
    if has_results:
        changed.write_bytes(old)
    else:
        changed.touch()
    assert run(path).code == 0
    assert results(folder).height == 200


def test_a_touched_shard_is_the_same_shard(folder: Place, two_shards: Path) -> None:
    assert run(two_shards, "--limit", "70").code == 0
    Path(folder.url("in", "a.parquet")).touch()
    assert run(two_shards).code == 0
    assert results(folder).height == 200


def test_retry_failed_computes_only_the_failed_rows(folder: Place, two_shards: Path) -> None:
    failing = run(two_shards, fake={"reject_every": 10})
    assert failing.code == 3
    num_failed = failing.result["rows_failed"]
    assert run(two_shards, fake={"fail_build": "the engine was built"}).code == 3, "without a model"
    retried = run(two_shards, "--retry-failed")
    assert retried.code == 0, retried.stderr
    assert retried.result["rows_computed"] == num_failed
    assert retried.result["rows_failed"] == 0


def test_a_resumed_run_with_samples_equals_an_uninterrupted_one(
    folder: Place, tmp_path: Path
) -> None:
    """Samples are seeded by row so a resumed run equals an uninterrupted one."""
    folder.write_parquet("in/a.parquet", rows(60))
    sampling = {"n": 3, "temperature": 1.0, "seed": 7, "max_tokens": 16, "logprobs": 2}
    whole = write_job(tmp_path, job(folder, "whole", sampling=sampling), "whole.yaml")
    path = write_job(tmp_path, job(folder, sampling=sampling))
    assert run(whole).result["rows"] == 180
    assert run(path, "--limit", "25", "--set", "packing.order=input").code == 0
    assert run(path, fake={"max_num_seqs": 5}).code == 0
    have = results(folder)
    assert stable(have).equals(stable(results(folder, "whole")))
    assert have.select("row", "sample").rows() == [(r, s) for r in range(60) for s in range(3)]
    assert have["completion"].n_unique() > 150


def test_identical_prompts_are_computed_once_under_greedy_decoding(
    folder: Place, tmp_path: Path
) -> None:
    frame = pl.DataFrame({"id": range(30), "text": [f"prompt {n % 3}" for n in range(30)]})
    folder.write_parquet("in/a.parquet", frame)
    log = tmp_path / "requests.log"
    path = write_job(tmp_path, job(folder))
    ended = run(path, fake={"log_file": str(log)})
    assert ended.result["rows"] == 30
    assert len(log.read_text().splitlines()) == 3
    have = results(folder)
    assert have["duplicate_of"].to_list() == [None] * 3 + [n % 3 for n in range(3, 30)]
    assert have["completion"].to_list() == have["completion"].to_list()[:3] * 10


def test_another_job_on_the_same_output_is_refused_by_what_differs(
    folder: Place, two_shards: Path
) -> None:
    assert run(two_shards, "--limit", "10").code == 0
    refused = run(two_shards, "--set", "sampling.max_tokens=8")
    assert refused.code == 2
    assert "sampling.max_tokens: was 16, is 8" in refused.stderr
    restarted = run(two_shards, "--set", "sampling.max_tokens=8", "--restart")
    assert restarted.code == 0
    assert restarted.result["rows_computed"] == 200


def test_settings_that_change_no_result_may_change_between_runs(
    folder: Place, two_shards: Path
) -> None:
    assert run(two_shards, "--limit", "90").code == 0
    changed = ["packing.window_rows=32", "packing.batch_rows=7", "checkpoint.every_rows=5"]
    sets = [argument for value in changed for argument in ("--set", value)]
    ended = run(two_shards, *sets, "--set", "name=other")
    assert ended.code == 0, ended.stderr
    assert "window_rows stays 64" in ended.stderr
    assert results(folder).height == 200


def test_quiet_prints_nothing_on_success(folder: Place, two_shards: Path) -> None:
    ended = run(two_shards, "--quiet")
    assert (ended.code, ended.stdout, ended.stderr) == (0, "", "")


def test_the_last_line_of_stdout_and_stderr_merged_is_the_result(
    folder: Place, two_shards: Path
) -> None:
    import subprocess

    process = start(two_shards, "--log-format", "json", stdout=subprocess.PIPE)
    stdout, stderr = process.communicate(timeout=60)
    assert json.loads(stdout)["status"] == "complete"
    assert all(json.loads(line)["event"] for line in stderr.splitlines())


def test_status_and_show_read_an_output_that_is_being_computed(
    folder: Place, two_shards: Path
) -> None:
    process = start(two_shards, fake=SLOW)
    wait_until(folder.parts, what="a part")
    status = run(folder.url("out"), command=("status",))
    assert "running" in status.stdout
    shown = run(folder.url("out"), "--json", command=("show",))
    assert json.loads(shown.stdout.splitlines()[0])["shard"] == "a.parquet"
    kill(process)
    process.communicate()
    assert "died" in run(folder.url("out"), command=("status",)).stdout
    assert run(two_shards).code == 0
    status = run(folder.url("out"), command=("status",))
    assert "complete: 200 rows (0 failed)" in status.stdout


def test_slices_of_another_n_are_refused_while_one_is_at_work(
    folder: Place, two_shards: Path
) -> None:
    other = start(two_shards, "--shard", "1/2", fake=SLOW)
    wait_until(lambda: folder.names("out/_batchinfer/status"), what="the status file")
    refused = run(two_shards, "--shard", "1/3")
    assert refused.code == 75, refused.stderr
    kill(other)
    other.communicate()
    assert run(two_shards, "--shard", "1/3").code == 0


def test_a_limit_of_just_all_rows_completes_the_output(folder: Place, two_shards: Path) -> None:
    ended = run(two_shards, "--limit", "200")
    assert ended.result["status"] == "complete"


def test_what_decides_which_prompts_are_too_long_may_not_change(two_shards: Path) -> None:
    assert run(two_shards, "--limit", "10").code == 0
    refused = run(two_shards, "--set", "model.max_model_len=100")
    assert refused.code == 2
    assert "max_model_len: was 2048, is 100" in refused.stderr


def test_a_restart_deletes_nothing_while_a_strangers_file_is_in_the_output(
    folder: Place, two_shards: Path
) -> None:
    assert run(two_shards).code == 0
    folder.write_parquet("out/foreign.parquet", rows(3))
    refused = run(two_shards, "--restart")
    assert refused.code == 2
    assert "foreign.parquet" in refused.stderr
    assert {"a.parquet", "b.parquet", "_SUCCESS"} <= set(folder.names("out"))
