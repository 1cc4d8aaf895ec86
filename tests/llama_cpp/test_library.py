"""What is made of the lines that llama.cpp prints."""

from __future__ import annotations

import logging

import pytest

from batchinfer.llama_cpp import library


def test_its_lines_are_logged_whole_but_for_details_of_every_graph(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "last_errors", [])
    detail, info, warning, error, continued = range(1, 6)
    write = library._logging()
    with caplog.at_level(logging.DEBUG):
        write(detail, b"a node of a graph", None)
        write(continued, b" and its inputs\n", None)
        write(info, b"loading ", None)
        write(continued, b"tensors\n", None)
        write(warning, b"slow\n", None)
        write(error, b"no room\n", None)
    told = [(record.levelno, record.message) for record in caplog.records]
    assert told == [
        (logging.DEBUG, "llama.cpp: loading tensors"),
        (logging.INFO, "llama.cpp: slow"),
        (logging.INFO, "llama.cpp: no room"),
    ]
    assert library.last_errors == ["no room"]
