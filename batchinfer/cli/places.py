"""Where a job's relative paths start: a note for messages about a path that does not exist.

They start at the current directory, wherever the job file is: the file can be moved, and `--set`
means the same as the file. A scheduler's current directory is rarely the one that was meant.
Must not know: what is at the paths.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from batchinfer.config import Job
from batchinfer.config.job_file import relative_to
from batchinfer.errors import ConfigError

_WILDCARDS = frozenset("*?[")


@contextmanager
def explained_places(job: Job, job_path: str | None) -> Iterator[None]:
    """Add to an error about a relative path where it starts, and where it would be found.

    `job_path` None: without a job file.
    """
    try:
        yield
    except ConfigError as error:
        message = str(error)
        lost = [path for path in _relative(job) if path in message and not _is_there(".", path)]
        if lost:
            error.args = (f"{message}\n{_explanation(lost, job_path)}",)
        raise


def _explanation(lost: list[str], job_path: str | None) -> str:
    folder = Path(job_path or "").parent.resolve()
    if beside := next((path for path in lost if _is_there(folder, path)), None):
        return f"Note: {relative_to()}; the job file's folder, {folder}, has {beside}: start there"
    return f"Note: {relative_to()}"


def _relative(job: Job) -> list[str]:
    """What is read from this machine and given by a relative path."""
    model = job.model
    paths = [*job.input.path, model.path, model.tokenizer, model.lora, *model.adapters.values()]
    return [
        path for path in paths if path and "://" not in path and not path.startswith(("/", "~"))
    ]


def _is_there(folder: str | Path, path: str) -> bool:
    """Whether `path` exists; if it is a pattern, whether the folders before its wildcards do."""
    parts = takewhile(lambda part: not _WILDCARDS.intersection(part), Path(path).parts)
    try:
        return Path(folder, *parts).exists()
    except OSError:
        return False
