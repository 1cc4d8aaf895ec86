"""What tests of failures share: jobs with a mistake, files with one, and how a start must end."""

from __future__ import annotations

from typing import Any

from tests.support.jobs import Ended, Place


def changed(settings: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """The job with sections merged over its own."""
    return settings | {name: settings.get(name, {}) | s for name, s in sections.items()}


def must_fail(ended: Ended, code: int, *words: str) -> None:
    """Ended with `code` and one message that holds all `words`, not with a traceback."""
    assert ended.code == code, ended.stderr
    assert "Traceback" not in ended.stderr and "this is a bug" not in ended.stderr
    for word in words:
        assert word in ended.stderr, f"{word!r} is not in:\n{ended.stderr}"
    assert ended.result["status"] == "failed"
    assert ended.result["exit_code"] == code


def must_be_untouched(place: Place, output: str = "out") -> None:
    """Neither results nor the record of a job: the mended job can begin here."""
    left = [n for n in place.names(output) if not n.startswith("_batchinfer/leases/")]
    assert not left


def write_bytes(place: Place, name: str, content: bytes) -> None:
    with place.fs.open(place.url(name), "wb") as sink:
        sink.write(content)


def read_bytes(place: Place, name: str) -> bytes:
    with place.fs.open(place.url(name), "rb") as source:
        content: bytes = source.read()
    return content
