"""What an entry's figures follow from, and the folder in which they are kept.

An entry's folder is named after the content of all files of its model, its text, its settings, the
versions and the machine that compute it; so a spec that says the same finds what it computed,
whatever an entry is called, and one whose model was made again computes it again. The folder holds
the score job's output too, which is why a comparison that was killed continues where it stopped.
Must not know: how anything is measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from batchinfer import __version__
from batchinfer.engine.kinds import engine_kind
from batchinfer.errors import BatchInferError, LeaseHeld
from batchinfer.evaluation.comparison.spec import Planned
from batchinfer.evaluation.content import model_content, text_digest
from batchinfer.evaluation.outputs import read_output
from batchinfer.evaluation.record import PerplexityRequest, Record
from batchinfer.storage.flock import FileLock
from batchinfer.storage.local_errors import os_errors

_RECORD, _WORK, _LOG = "record.json", "work", "log.txt"
_WARNINGS = "warnings"


@dataclass(frozen=True, slots=True)
class Measured:
    """`warnings`: what the measurement warned of; they hold for the figures as long as these."""

    record: Record
    warnings: tuple[str, ...] = ()


class Slot:
    """The folder of one entry."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / _WORK
        self.output = self.work / "output"  # of the score job, as evaluation/perplexity.py has it
        self.log = folder / _LOG

    def read(self, plan: Planned, reference_key: str | None) -> Measured | None:
        """What was measured, under the names that the plan has now. None: not yet, or not wholly.

        `reference_key`: the slot of the reference, None without one.
        """
        try:
            content = json.loads(self._path(reference_key).read_bytes())
            warnings = tuple(map(str, content.pop(_WARNINGS, ())))
            record = Record.model_validate(content)
        except (FileNotFoundError, ValueError, AttributeError):
            return None
        request = plan.request
        names = {
            "label": request.label,
            "family": request.family,
            "model": request.model,
            "reference": plan.reference if reference_key else None,
        }
        return Measured(record.model_copy(update=names), warnings)

    def write(self, measured: Measured, reference_key: str | None) -> None:
        content = measured.record.model_dump(mode="json") | {_WARNINGS: measured.warnings}
        write_whole(self._path(reference_key), json.dumps(content, indent=1).encode())

    @property
    def has_output(self) -> bool:
        """Whether what the figures were read from is still there, as an output as a whole."""
        try:
            read_output(str(self.output))
        except BatchInferError:
            return False
        return True

    def _path(self, reference_key: str | None) -> Path:
        """KL divergences from two references are two records of one output."""
        name = f"record-{reference_key}.json" if reference_key else _RECORD
        return self.folder / name


class Cache:
    """The slots of a comparison, below its output."""

    def __init__(self, out: Path) -> None:
        self._folder = out / "entries"

    def slot(self, key: str) -> Slot:
        return Slot(self._folder / key)

    @contextmanager
    def held(self, keys: Mapping[str, bool]) -> Iterator[None]:
        """Hold these slots, True: to write or delete what is in them, False: only to read it.

        Readers share a slot. Raises LeaseHeld, holding none, where another comparison has one. The
        locks are beside the slots, so that deleting a slot leaves its lock.
        """
        with ExitStack() as stack:
            for key, is_written in keys.items():
                lock = FileLock(self._folder / f"{key}.lock")
                if not lock.acquire(shared=not is_written):
                    raise LeaseHeld(
                        f"{self._folder / key} is in use by another comparison that runs now: "
                        "start again when it has ended. Nothing was deleted or written"
                    )
                stack.callback(lock.release)
            yield

    def clear(self, keys: Iterable[str]) -> None:
        """Delete these slots, which the caller holds."""
        for folder in (self._folder / key for key in keys):
            with os_errors("delete", folder):
                if folder.exists():
                    shutil.rmtree(folder)


def key_of(request: PerplexityRequest) -> str:
    """Names everything that decides the figures, but not what they are called or compared with.

    Raises ConfigError for a model, a text or a folder that is not there or damaged.
    """
    asked = request.model_dump(mode="json", exclude={"label", "family", "model", "reference"})
    packages = ("batchinfer", *engine_kind(request.engine).packages())
    parts = {
        "request": asked,
        "model": model_content(request),
        "text": text_digest(request.data, request.column),
        "machine": _machine(request.engine),
        "versions": {name: _version(name) for name in packages} | {"batchinfer": __version__},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def write_whole(path: Path, content: bytes) -> None:
    """The file is there as a whole or as it was."""
    with os_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(content)
        temporary.replace(path)


@cache
def _machine(engine: str) -> str:
    """What figures depend on below the engine: other kernels round differently."""
    machine = asdict(engine_kind(engine).machine())
    library = machine["library"] or {}
    return repr((machine["device"], machine["compute_capability"], library.get("file")))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
