"""One batch file, from its lines to the files of answers and errors, with a run in between.

    FILE.batchinfer/requests.parquet      the lines as rows, made once
    FILE.batchinfer/results/              the run's output, as of any job
    FILE, FILE.errors.jsonl               written once the output is complete

Whatever ends it, the same command goes on: what the folder holds tells how far it came. Must not
know: processes, click, engines.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchinfer.config import LoadedJob
from batchinfer.config.template_file import text_of
from batchinfer.errors import ConfigError
from batchinfer.ledger import Holder, Lease, acquire_lease
from batchinfer.ledger.lease import WHOLE
from batchinfer.model import ModelFacts
from batchinfer.openai_batch.answers import Answers
from batchinfer.openai_batch.convert import (
    FILTER,
    KEPT,
    Converted,
    Source,
    convert,
    own_columns,
    read_converted,
)
from batchinfer.openai_batch.finish import Written, write_answers
from batchinfer.openai_batch.lines import BatchFile, opened, read_lines
from batchinfer.prompt.load_encoder import load_encoder
from batchinfer.runner.factory import model_of
from batchinfer.storage import Store, is_s3, open_store
from batchinfer.storage.local_errors import os_errors

logger = logging.getLogger("batchinfer.openai_batch")

REQUESTS = "requests.parquet"
RESULTS = "results"
_ANSWERS, _ERRORS = "answers.jsonl", "errors.jsonl"
_OF_ERRORS = "errors.sha256"  # of the file of errors that was written last
#: What OpenAI's endpoints do where a request does not say it; the model's own settings do not
#: count.
_TEMPERATURE = 1.0


@dataclass(frozen=True, slots=True)
class BatchFiles:
    """Where everything of a batch is."""

    source: Path
    output: Path
    errors: Path

    @classmethod
    def of(cls, source: str, output: str, errors: str | None) -> BatchFiles:
        """Raises ConfigError for places that cannot be."""
        for option, value in (("-i", source), ("-o", output), ("-e", errors)):
            if value is not None and is_s3(value):
                raise ConfigError(f"{option} {value}: a batch file is a local file")
        target = Path(output).expanduser()
        beside = target.with_name(_errors_name(target.name))
        files = cls(
            Path(source).expanduser(),
            target,
            beside if errors is None else Path(errors).expanduser(),
        )
        if len({path.resolve() for path in (files.source, files.output, files.errors)}) < 3:
            raise ConfigError("-i, -o and -e must be three different files")
        for path in (files.output, files.errors):
            if path.is_dir():
                raise ConfigError(f"{path} is a folder: -o and -e name files")
            if path.exists() and not path.is_file():
                raise ConfigError(f"{path} is no regular file: -o and -e name files of their own")
        return files

    @property
    def folder(self) -> Path:
        return self.output.with_name(f"{self.output.name}.batchinfer")


def _errors_name(name: str) -> str:
    """Another for each file of answers."""
    stem = name.removesuffix(".jsonl")
    return f"{stem}.errors.jsonl" if stem != name else f"{name}.errors"


class Batch:
    """`prepare` it, run the job that `otherwise` begins, `finish`."""

    def __init__(
        self, files: BatchFiles, served_name: str | None, chat_template: str | None
    ) -> None:
        self.files = files
        self._served_name = served_name
        self._chat_template = None if chat_template is None else _text_of(chat_template)
        self._store: Store = open_store(str(files.folder.absolute()))
        self._model: ModelFacts | None = None
        self._converted = Converted()
        self._made_of: Mapping[str, Any] = {}
        self._name = ""
        self._has_logprobs = False
        self._lease: Lease | None = None

    def otherwise(self) -> dict[str, Any]:
        """The job, as far as the batch says it; see `load_job`."""
        columns = own_columns(self._converted.settings)
        return {
            "name": "run-batch",
            "input": {
                "path": self._store.url_of(REQUESTS),
                "keep_columns": list(KEPT),
                "filter": FILTER,
            },
            "prompt": {"token_ids_column": "token_ids"},
            # Each row has a `max_tokens` of its own, also where its line does not say it.
            "sampling": {"temperature": _TEMPERATURE, "max_tokens": 1, "per_row": columns},
            "limits": {"max_failed_fraction": 1.0},  # a failed line is in the file of errors
            "output": {"path": self._store.url_of(RESULTS)},
        }

    def prepare(self, loaded: LoadedJob, holder: Holder, *, is_restart: bool) -> Converted:
        """Make rows of the lines, unless that is done. `loaded`: of `otherwise`, before it.

        From here to the end of the process the folder is this start's: another one would replace
        the rows that this one computes. Raises ConfigError for a model that cannot be, and for a
        folder that is another batch's, InputError for a file that cannot be read, LeaseHeld.
        """
        model = self._model = model_of(loaded.job)
        self._name = self._served_name or loaded.job.model.path
        self._has_logprobs = loaded.job.sampling.logprobs is not None  # of lines that say nothing
        with opened(self.files.source) as file:
            source = self._source(loaded, model, file)
            self._made_of = source.made_of
            lease = self._lease = acquire_lease(self._store, WHOLE, holder)
            try:
                return self._rows(file, source, model, is_restart=is_restart)
            except BaseException:
                lease.undo()
                raise

    def _rows(
        self, file: BatchFile, source: Source, model: ModelFacts, *, is_restart: bool
    ) -> Converted:
        found = None if is_restart else read_converted(self._store, REQUESTS)
        if found is None:
            target = (self._store, REQUESTS)
            self._converted = convert(read_lines(file), source, model, target)
            return self._converted
        made_of, self._converted = found
        if made_of != source.made_of:
            names = sorted(k for k, v in source.made_of.items() if made_of.get(k) != v)
            raise ConfigError(
                f"{self.files.folder} holds the results of a batch with another "
                f"{', '.join(names)}: choose another -o, or set that back; if nobody needs its "
                "results, --restart deletes them"
            )
        return self._converted

    def finish(self) -> Written:
        """Write both files. The output is complete."""
        assert self._model is not None
        encoder = None
        if self._has_logprobs or "logprobs" in self._converted.settings:
            encoder = load_encoder(self._model.tokenizer_path, trust_remote_code=False)
        answers = Answers(str(self._made_of["input"]), self._name, encoder)
        store = self._store
        store.sweep(lambda key: key in (REQUESTS, _ANSWERS, _ERRORS))
        with ExitStack() as stack:
            requests = stack.enter_context(store.open(REQUESTS))
            results = stack.enter_context(store.open(f"{RESULTS}/{REQUESTS}"))
            written = write_answers(requests, results, answers, store, (_ANSWERS, _ERRORS))
        self._keep_facts_of_errors()
        for key, path in ((_ERRORS, self.files.errors), (_ANSWERS, self.files.output)):
            made = self.files.folder / key
            with os_errors("write", path):
                if made.exists():
                    _move(made, path.resolve())
                elif key == _ERRORS and path.exists():
                    self._delete_errors(path)
        return written

    def _keep_facts_of_errors(self) -> None:
        """What is put beside the answers, so that it is known again."""
        made = self.files.folder / _ERRORS
        if made.exists():
            self._store.put(_OF_ERRORS, _sha256_of(made).encode())

    def _delete_errors(self, path: Path) -> None:
        """Of an earlier batch under this output, or of this one before its lines were asked again;
        another's file stays.
        """
        known = self._store.stat(_OF_ERRORS) and self._store.read(_OF_ERRORS).decode()
        if path.is_file() and _sha256_of(path) == known:
            path.unlink(missing_ok=True)
        else:
            logger.warning(
                "no line failed, and %s is not what this batch wrote there: it is left as it is",
                path,
            )

    def _source(self, loaded: LoadedJob, model: ModelFacts, file: BatchFile) -> Source:
        job, sampling = loaded.job, loaded.job.sampling
        names = {self._name, job.model.path, Path(job.model.path).name}
        is_said = loaded.origins["sampling.max_tokens"] != "default"
        max_tokens = sampling.max_tokens if is_said else None
        made_of = {
            "input": file.sha256,
            "model": dict(model.digest),
            "context": model.max_model_len,
            "served model name": sorted(names),
            "model.adapters": sorted(job.model.adapters),
            "chat template": self._chat_template,
            "sampling.max_tokens": max_tokens,
        }
        return Source(made_of, names, job.model.adapters, sampling, max_tokens, self._chat_template)


def _text_of(chat_template: str) -> str:
    """That of a file, so that a batch is known by the text. Raises ConfigError."""
    try:
        return text_of(chat_template)
    except ValueError as error:
        raise ConfigError(f"--chat-template: {error}") from None


def _move(made: Path, path: Path) -> None:
    """Whole or not at all, also to another file system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(made, path)  # noqa: PTH105
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with made.open("rb") as source, beside.open("wb") as target:
                shutil.copyfileobj(source, target)
                target.flush()
                os.fsync(target.fileno())
            os.replace(beside, path)  # noqa: PTH105
        finally:
            beside.unlink(missing_ok=True)
        made.unlink()


def _sha256_of(path: Path) -> str:
    with os_errors("read", path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
