"""Data sets and models of the hub, from a server that answers as it does, or does not answer."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from batchinfer.evaluation import Record
from tests.support.hub_server import Hub, serve_hub
from tests.support.jobs import MODEL, Ended, run

pytestmark = pytest.mark.slow

BRANCH = "refs/convert/parquet"


def parquet(*rows: str) -> bytes:
    sink = io.BytesIO()
    pl.DataFrame({"text": rows}).write_parquet(sink)
    return sink.getvalue()


@pytest.fixture
def hub() -> Iterator[Hub]:
    words = "one two three four five six seven eight nine ten "
    files = {
        "default/test/0000.parquet": parquet(words * 3, "", words),
        "default/test/0001.parquet": parquet(words * 2),
        "default/train/0000.parquet": parquet("not asked for"),
        "other/valid/0000.parquet": parquet(words),
    }
    model = {path.name: path.read_bytes() for path in MODEL.iterdir()}
    with serve_hub(
        {"datasets/org/set": {BRANCH: files}, "models/org/model": {"main": model}}
    ) as served:
        yield served


def perplexity(
    data: str, hub: Hub, folder: Path, *options: str, model: str = str(MODEL), **environ: str
) -> Ended:
    options = ("--context", "16", "--stride", "4", "--data", data, *options)
    environ = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf")} | environ
    work = ("--work", str(folder / "work"))
    return run(model, *options, *work, command=("perplexity",), environ=environ)


def test_the_files_of_the_split_are_measured_and_no_others_are_downloaded(
    hub: Hub, tmp_path: Path
) -> None:
    """The same as of a local copy; and once more from the cache, without the hub."""
    ended = perplexity("hub:org/set", hub, tmp_path)
    assert ended.code == 0, ended.stderr
    assert "1 of 4 rows that were read have no text" in ended.stderr
    got = [
        line.rpartition("/resolve/")[2] for line in hub.asked if line.startswith("GET /datasets")
    ]
    assert sorted(name.partition("/")[2] for name in got) == [
        "default/test/0000.parquet",
        "default/test/0001.parquet",
    ]
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in hub.files["datasets/org/set"][BRANCH].items():
        if name.startswith("default/test/"):
            (copy / Path(name).name).write_bytes(content)
    local = perplexity(str(copy), hub, tmp_path / "local", "--column", "text")
    found, expected = (Record.model_validate_json(e.stdout) for e in (ended, local))
    assert (found.data_digest, found.nll) == (expected.data_digest, expected.nll)
    asked = len(hub.asked)
    offline = perplexity("hub:org/set", hub, tmp_path, HF_HUB_OFFLINE="1")
    assert (offline.code, offline.stdout) == (0, ended.stdout)
    assert len(hub.asked) == asked


def test_a_model_is_downloaded_as_a_data_set_is(hub: Hub, tmp_path: Path) -> None:
    ended = perplexity("hub:org/set", hub, tmp_path, model="org/model")
    assert ended.code == 0, ended.stderr
    none = perplexity("hub:org/set", hub, tmp_path / "none", model="org/none")
    assert none.code == 2
    assert "there is no such local folder: could not get" in none.stderr


def test_a_configuration_and_a_split_can_be_named(hub: Hub, tmp_path: Path) -> None:
    ended = perplexity("hub:org/set/other/valid", hub, tmp_path)
    assert ended.code == 0, ended.stderr


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("hub:org/none", "could not get org/none at revision refs/convert/parquet from the hub"),
        ("hub:org/set/default/dev", "has no default/dev on the hub's branch"),
        ("hub:set", "write hub:ORG/NAME"),
    ],
)
def test_what_the_hub_does_not_have_is_said(
    data: str, problem: str, hub: Hub, tmp_path: Path
) -> None:
    ended = perplexity(data, hub, tmp_path)
    assert ended.code == 2
    assert problem in ended.stderr
    assert not (tmp_path / "work" / "output").exists()


def test_without_a_network_the_message_comes_soon_and_names_the_hub(
    hub: Hub, tmp_path: Path
) -> None:
    """Where connections are refused, and where they are made and nothing comes back."""
    hub.is_up = False
    refusing = Hub({}, "http://127.0.0.1:9")
    for one, why in ((refusing, "Connection refused"), (hub, "ReadTimeout")):
        begun_s = time.monotonic()
        ended = perplexity("hub:org/set", one, tmp_path)
        assert ended.code == 2, ended.stderr
        assert "the data hub:org/set: could not get org/set at revision" in ended.stderr
        assert f"from the hub ({one.url})" in ended.stderr
        assert why in ended.stderr
        assert "Traceback" not in ended.stderr
        assert time.monotonic() - begun_s < 60  # it waits 10 s; others use this machine
