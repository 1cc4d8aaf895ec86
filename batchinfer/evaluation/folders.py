"""Where an evaluation may write: not where others have written, and not where nothing can be.

Must not know: what is measured. Whatever is refused stays as it was.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchinfer.errors import ConfigError
from batchinfer.evaluation.windows import GIVEN, ID, SCORED
from batchinfer.ledger import layout
from batchinfer.storage import is_s3, local_path, why_no_folder
from batchinfer.storage.local_errors import os_errors

_ADVICE = "give a new folder"
_TEMPORARY = re.compile(r"\.job\.yaml\.\d+\.tmp")
#: What the files of the model held: beside the windows.
CONTENT = "content.json"


def local_folder(option: str, location: str) -> Path:
    """Raises ConfigError for a bucket."""
    if is_s3(location):
        raise ConfigError(f"{option} {location}: it is written to a local folder; {_ADVICE}")
    return local_path(location)


def check_work(work: Path) -> None:
    """Raise ConfigError unless it is new, empty, or a measurement's work folder."""
    _check_place("--work", work)
    job, record = work / "job.yaml", work / "output" / layout.JOB_KEY
    if job.exists() and not _is_measurement(_read(job)):
        raise ConfigError(f"--work {work}: {job} is not from a measurement: {_ADVICE}")
    if record.exists() and not _is_measurement(_read(record).get("job")):
        raise ConfigError(f"--work {work}: {work / 'output'} is another job's output: {_ADVICE}")
    if job.exists() or record.exists() or not work.is_dir():
        return
    with os_errors("read", work):
        others = sorted(path.name for path in work.iterdir() if not _TEMPORARY.fullmatch(path.name))
    if others:
        raise ConfigError(
            f"--work {work}: that folder has {others[0]} and is not from a measurement: {_ADVICE}"
        )


def make_work(work: Path) -> None:
    """Make the work folder of a measurement, which `check_work` did not refuse."""
    _make("--work", work)


def check_begun(work: Path, windows: Path, content: Mapping[str, str], *, restart: bool) -> bool:
    """Whether the output of `work` is begun. Raises ConfigError if it is of other windows or of
    files of a model that have changed since: figures of both would be one.

    `windows`: the file, in a folder named after the `content` of the model.
    """
    record = work / "output" / layout.JOB_KEY
    if not record.exists():
        return False
    paths = (_read(record).get("job") or {}).get("input", {}).get("path") or []
    paths = [Path(path) for path in ([paths] if isinstance(paths, str) else paths)]
    if restart:
        return True
    if {path.name for path in paths} != {windows.name}:
        raise ConfigError(
            f"--work {work}: its output is for other windows (another text, context, stride or "
            f"number of them): {_ADVICE}, or delete that output with --restart"
        )
    was = {path.parent.name for path in paths}
    if was != {windows.parent.name}:
        raise ConfigError(
            f"--work {work}: its output is of the model with other content: "
            f"{_changed(_read(windows.parents[1] / was.pop() / CONTENT), content)}. {_ADVICE}, or "
            "delete that output with --restart"
        )
    return True


def _changed(was: Mapping[str, Any], content: Mapping[str, str]) -> str:
    names = sorted(n for n in was.keys() | content.keys() if was.get(n) != content.get(n))
    if not was:
        return "an earlier version computed it, which did not note what the files held"
    return f"{', '.join(names[:3])}{' and others' if len(names) > 3 else ''} changed since"


def check_out(out: Path) -> None:
    """Make the folder of a comparison. Raises ConfigError if others have written there."""
    _check_place("--out", out)
    is_ours = {"records", "batchinfer_version"} <= _read(out / "results.json").keys()
    for path in sorted([*out.glob("results.*"), out / "comparison.html", out / "job.yaml"]):
        if path.exists() and (path.name == "job.yaml" or not is_ours):
            raise ConfigError(f"--out {out}: {path.name} there is not from a comparison: {_ADVICE}")
    _make("--out", out)


def _check_place(option: str, folder: Path) -> None:
    real = Path(os.path.realpath(folder))
    for place in (real, *real.parents):
        with os_errors("read", place):
            is_file = place.exists() and not place.is_dir()
            is_output = not is_file and _is_output(place)
        if is_output:
            where = "is" if place == real else f"is inside {place},"
            raise ConfigError(f"{option} {folder}: it {where} an output of a job: {_ADVICE}")
        if is_file:
            raise ConfigError(f"{option} {folder}: {place} is not a folder: {_ADVICE}")
    if (problem := why_no_folder(folder)) is not None:
        raise ConfigError(f"{option} {folder}: {problem}")


def _is_output(folder: Path) -> bool:
    """Not if there are only leases, which refused starts of earlier versions left behind."""
    meta = folder / layout.META
    return meta.is_dir() and any(
        f"{layout.META}/{f.name}/" != layout.LEASES_PREFIX for f in meta.iterdir()
    )


def _make(option: str, folder: Path) -> None:
    try:
        with os_errors("create", folder):
            folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # as below /proc
        raise ConfigError(f"{option} {folder} cannot be created here: {_ADVICE}") from error


def _read(path: Path) -> dict[str, Any]:
    """A file of JSON as we write them; of any other nothing."""
    try:
        with os_errors("read", path):
            content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_measurement(job: object) -> bool:
    """Whether it is a job over windows, as evaluation/perplexity.py makes them."""
    wanted = {
        ("input", "id_column"): ID,
        ("prompt", "token_ids_column"): GIVEN,
        ("score", "completion_column"): SCORED,
    }
    return isinstance(job, Mapping) and all(
        isinstance(section := job.get(name), Mapping) and section.get(key) == value
        for (name, key), value in wanted.items()
    )
