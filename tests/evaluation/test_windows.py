"""Texts as token streams, and windows in which each token is scored once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.errors import ConfigError, InputError
from batchinfer.evaluation import windows as module
from batchinfer.evaluation.texts import NAMED, text_of
from batchinfer.evaluation.windows import TokenStream, make_windows, stream_of, windows_of
from batchinfer.prompt.encode import TokenEncoder
from tests.support.jobs import MODEL, ROOT


@pytest.fixture(scope="module")
def encoder() -> TokenEncoder:
    return TokenEncoder(str(MODEL))


def stream(num_tokens: int) -> TokenStream:
    """Of tokens that are their positions, three bytes each."""
    positions = np.arange(num_tokens, dtype=np.int32)
    return TokenStream(positions, 3 * (positions.astype(np.int64) + 1))


@given(num_tokens=st.integers(0, 60), context=st.integers(2, 20), data=st.data())
def test_each_token_is_scored_once_with_context_less_stride_tokens_before_it(
    num_tokens: int, context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context - 1))
    scored: list[int] = []
    for start, first, stop in windows_of(stream(num_tokens), context, stride):
        assert start % stride == 0
        assert stop - start <= context
        assert first - start >= (context - stride if start else 1)
        scored += range(first, stop)
    assert scored == list(range(1, num_tokens))


def test_a_window_is_a_row_and_the_bytes_of_what_it_scores_are_counted(tmp_path: Path) -> None:
    written = make_windows(stream(11), 6, 2)
    written.write(tmp_path)
    rows = pq.read_table(tmp_path / written.name).to_pylist()
    assert [row["window"] for row in rows] == [0, 1, 2, 3]
    assert [row["given_token_ids"] for row in rows] == [
        [0],
        [2, 3, 4, 5],
        [4, 5, 6, 7],
        [6, 7, 8, 9],
    ]
    assert [row["scored_token_ids"] for row in rows] == [[1, 2, 3, 4, 5], [6, 7], [8, 9], [10]]
    assert [row["num_bytes"] for row in rows] == [15, 6, 6, 3]
    assert (written.num_windows, written.num_tokens, written.num_bytes) == (4, 10, 30)


def test_equal_windows_are_one_file_and_others_another(tmp_path: Path) -> None:
    one = make_windows(stream(11), 6, 2)
    one.write(tmp_path)
    before = (tmp_path / one.name).stat().st_mtime_ns
    assert make_windows(stream(11), 6, 2) == one
    one.write(tmp_path)
    assert (tmp_path / one.name).stat().st_mtime_ns == before
    assert make_windows(stream(12), 6, 2).name != one.name
    assert make_windows(stream(11), 6, 3).digest != one.digest


def test_the_bytes_of_tokens_are_those_of_the_text(tmp_path: Path, encoder: TokenEncoder) -> None:
    """Also where one character is several tokens."""
    path = tmp_path / "a.txt"
    text = "naïve 日本 🙂🙂 a\r\nb é"
    path.write_bytes(text.encode())
    found = stream_of(text_of(str(path)), encoder, None)
    assert found.token_ids.tolist() == encoder.encode([text], add_special_tokens=True)[0].tolist()
    assert found.ends[-1] == len(text.encode())
    assert (np.diff(found.ends) >= 0).all()


def test_the_first_tokens_are_the_same_however_much_of_the_text_is_read(
    encoder: TokenEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stream_of(text_of("wikitext2"), encoder, None)
    assert len(whole.token_ids) > 400_000
    monkeypatch.setattr(module, "_CHARS_PER_TOKEN", 1)  # too few: it has to read on
    for max_tokens in (1, 700, 5000):
        part = stream_of(text_of("wikitext2"), encoder, max_tokens)
        assert part.token_ids.tolist() == whole.token_ids[:max_tokens].tolist()
        assert part.ends.tolist() == whole.ends[:max_tokens].tolist()


def test_a_text_beyond_what_fits_in_memory_is_refused(
    encoder: TokenEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_CHARS", 10_000)
    with pytest.raises(InputError, match="more than 10,000 characters"):
        stream_of(text_of("wikitext2"), encoder, None)
    assert len(stream_of(text_of("wikitext2"), encoder, 100).token_ids) == 100


def test_wikitext2_is_the_file_that_its_lines_were_cut_from() -> None:
    text = "\n".join(text_of("wikitext2").pieces())
    assert text.startswith(" \n = Robert <unk> = \n \n Robert <unk> is an English film")
    assert len(text.encode()) == 1_256_449
    assert (Path(NAMED["wikitext2"][0]).parent / "README.md").is_file()


def test_rows_of_parquet_are_paragraphs() -> None:
    shard = "jobs/demo/prompts/prompts-00000-of-00004.parquet"
    text = text_of(str(ROOT / shard), "description")
    rows = pl.read_parquet(ROOT / shard)["description"].to_list()
    assert text.separator.join(text.pieces()) == "\n\n".join(rows)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "is empty"), (b" \n ", "is empty"), (b"a", "at least 2"), (b"\xff\xfe", "not UTF-8")],
)
def test_a_text_with_nothing_to_measure_is_refused(
    content: bytes, problem: str, tmp_path: Path, encoder: TokenEncoder
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=problem):
        make_windows(stream_of(text_of(str(path)), encoder, 100), 8, 4)


@pytest.mark.parametrize(
    ("data", "column", "problem"),
    [
        ("wikitext3", None, "no such file, and no such name"),
        ("wikitext2", "line", "has one column"),
        ("a/*.parquet", None, "name the column"),
        (str(MODEL / "config.json"), "text", "leave column 'text' out"),
        ("hub:name", None, "write hub:ORG/NAME"),
    ],
)
def test_data_that_cannot_be_meant_is_refused(data: str, column: str | None, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        text_of(data, column)


def test_a_column_without_text_is_refused(tmp_path: Path) -> None:
    pl.DataFrame({"n": [1]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="is int64, not text"):
        list(text_of(str(tmp_path / "a.parquet"), "n").pieces())


def rows_as_text(rows: list[str | None], tmp_path: Path) -> Path:
    path = tmp_path / f"{len(rows)}.parquet"
    pl.DataFrame({"t": rows}, schema={"t": pl.String}).write_parquet(path)
    return path


def test_blank_rows_are_not_part_of_the_text_and_are_counted(
    encoder: TokenEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = stream_of(text_of(str(rows_as_text(["a b", "c"], tmp_path)), "t"), encoder, None)
    assert not caplog.records
    blank = rows_as_text(["", "a b", None, " \t\n", "\u3000", "c", ""], tmp_path)
    found = stream_of(text_of(str(blank), "t"), encoder, None)
    assert found.token_ids.tolist() == whole.token_ids.tolist()
    assert found.ends.tolist() == whole.ends.tolist()
    assert "5 of 7 rows that were read have no text" in caplog.text


def test_rows_that_are_all_blank_are_refused(encoder: TokenEncoder, tmp_path: Path) -> None:
    path = rows_as_text(["", None, " "], tmp_path)
    with pytest.raises(InputError, match="is empty, or only white space"):
        stream_of(text_of(str(path), "t"), encoder, None)


def test_empty_rows_of_wikitext_are_its_own_line_breaks() -> None:
    text = text_of("wikitext2")
    assert not any(map(text.is_left_out, text.pieces()))
