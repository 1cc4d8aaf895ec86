"""Perplexity of a model on a text: windows -> a score job -> its finished output -> a record.

The windows are the rows of the job, so a killed evaluation continues at the windows that are
missing. Must not know: how an engine is driven, terminals.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchinfer.api import run
from batchinfer.config import Job, job_from
from batchinfer.config.load import SET_OPTION
from batchinfer.errors import ConfigError
from batchinfer.evaluation.bits import stored_bits
from batchinfer.evaluation.content import key_of_content, model_content
from batchinfer.evaluation.figures import RecordInputs, record_of
from batchinfer.evaluation.folders import CONTENT, check_begun, check_work, make_work
from batchinfer.evaluation.outputs import Output, read_output
from batchinfer.evaluation.record import PerplexityRequest, Record
from batchinfer.evaluation.reference import check_reference, closeness, open_reference
from batchinfer.evaluation.settings import check_settings
from batchinfer.evaluation.texts import text_of
from batchinfer.evaluation.tokenizers import tokenizer_digest
from batchinfer.evaluation.windows import (
    GIVEN,
    ID,
    NUM_BYTES,
    SCORED,
    TextWindows,
    make_windows,
    num_tokens_of,
    stream_of,
)
from batchinfer.ledger import layout
from batchinfer.model import ModelFacts
from batchinfer.prompt.encode import TokenEncoder
from batchinfer.prompt.load_encoder import load_encoder
from batchinfer.runner.factory import model_of
from batchinfer.storage.local_errors import os_errors


def measure(request: PerplexityRequest, *, work: Path, restart: bool = False) -> Record:
    """What `request` asks for, computed where it is not yet. See `prepare`."""
    return prepare(request, work, restart=restart).compute()


def prepare(
    request: PerplexityRequest, work: Path | None = None, *, restart: bool = False
) -> PreparedMeasurement:
    """Look at all that can be wrong with it. Nothing is written.

    `work`: a folder of this request's own; its windows, the job, the job's output and the record
    are kept there, so a call after an interruption continues, and one after the end computes
    nothing. None: one named after the request and the content of all that it names. `restart`:
    delete that output first. Raises ConfigError and InputError for what cannot be measured.
    """
    check_settings(request.settings)
    if work is not None:
        check_work(work)
    model = model_of(score_job(request, Path("windows"), Path("work")))
    check_windows(request, model.max_model_len)
    encoder = load_encoder(
        model.tokenizer_path,
        trust_remote_code=bool(request.settings.get("model.trust_remote_code")),
    )
    windows = _windows(request, encoder)
    check_vocabulary(windows, model)
    content = model_content(request)
    if work is None:
        work = default_work(request, content, windows)
        check_work(work)
    place = work / "windows" / key_of_content(content)
    is_begun = check_begun(work, place / windows.name, content, restart=restart)
    reference = None
    if request.reference is not None:
        reference = open_reference(request.reference)
        check_reference(reference, windows, model)
    # One more than a window: the engine generates a token for each, which is dropped.
    max_model_len = min(request.context + 1, model.max_model_len)
    top_k = request.top_k or (reference.job["score"]["top_logprobs"] if reference else None)
    return PreparedMeasurement(
        request=request,
        work=work,
        job=score_job(
            request, place / windows.name, work, max_model_len=max_model_len, top_k=top_k
        ),
        model=model,
        content=content,
        windows=windows,
        reference=reference,
        tokenizer_digest=tokenizer_digest(model.tokenizer_path),
        is_begun=is_begun,
        is_restart=restart,
    )


@dataclass(frozen=True, slots=True)
class PreparedMeasurement:
    """A request that can be measured, and where. Made by `prepare`."""

    request: PerplexityRequest
    work: Path
    job: Job
    model: ModelFacts
    content: Mapping[str, str]  # of the model: file -> sha256
    windows: TextWindows
    reference: Output | None
    tokenizer_digest: str
    is_begun: bool  # whether there is an output, of this very measurement unless it is a restart
    is_restart: bool

    @property
    def output(self) -> Path:
        return self.work / "output"

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to compute."""
        return not self.is_restart and (self.output / layout.SUCCESS_KEY).is_file()

    def begin(self) -> None:
        """Make the folder with all that the job reads. Idempotent.

        First the job, by which the folder is known to be a measurement's. The windows lie in a
        folder named after the model's content, so that the job says what it was computed with.
        """
        make_work(self.work)
        if not self.is_begun:
            _write_job(self.job, self.work)
        place = self.work / "windows" / key_of_content(self.content)
        _write(place / CONTENT, json.dumps(dict(self.content), indent=1))
        self.windows.write(place)

    def compute(self) -> Record:
        """What is not there yet, and the record of all of it.

        The engine runs in this process and holds its memory until the process ends. Raises what
        `batchinfer.run` raises.
        """
        self.begin()
        run(self.job, restart=self.is_restart, retry_failed=True)
        if self.is_begun:  # not before: it may be another measurement's, which is refused
            _write_job(self.job, self.work)
        output = read_output(self.job.output.path)
        found = RecordInputs(
            windows=self.windows,
            output=output,
            bits=stored_bits(self.model, output),
            tokenizer_digest=self.tokenizer_digest,
            closeness=closeness(self.reference, output) if self.reference else None,
        )
        record = record_of(self.request, found)
        _write(self.work / "record.json", record.model_dump_json(indent=2) + "\n")
        return record


def default_work(
    request: PerplexityRequest, content: Mapping[str, str], windows: TextWindows
) -> Path:
    """The folder of a request. Equal requests share one, so a second start continues the first.

    Equal are those that name the same content: weights or a text that changed are measured again.
    `content`: of the model.
    """
    parts = (request.model_dump_json(), key_of_content(content), windows.digest)
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
    return Path("out", "measured", f"{_slug(request.label)}-{digest}")


def check_windows(request: PerplexityRequest, max_model_len: int) -> None:
    """Raise ConfigError for windows that the model does not take, or that do not overlap."""
    if request.context > max_model_len:
        raise ConfigError(
            f"the context of {request.context} tokens is more than the {max_model_len} that "
            f"{request.model} takes: take a context of {max_model_len} or less"
        )
    if request.stride >= request.context:
        raise ConfigError(
            f"the stride of {request.stride} tokens must be less than the context of "
            f"{request.context}: the first token of a window has nothing before it, so windows "
            "have to overlap"
        )


def check_vocabulary(windows: TextWindows, model: ModelFacts) -> None:
    """Raise ConfigError for a token that the model does not have."""
    if windows.max_token_id >= model.vocab_size:
        raise ConfigError(
            f"the tokenizer in {model.tokenizer_path} gives token id {windows.max_token_id}, the "
            f"model {model.path} has a vocabulary of {model.vocab_size}: they do not belong "
            "together, give the model's own tokenizer"
        )


def _windows(request: PerplexityRequest, encoder: TokenEncoder) -> TextWindows:
    max_tokens = None
    if request.max_rows is not None:
        max_tokens = num_tokens_of(request.max_rows, request.context, request.stride)
    stream = stream_of(text_of(request.data, request.column), encoder, max_tokens)
    return make_windows(stream, request.context, request.stride)


def score_job(
    request: PerplexityRequest,
    windows: Path,
    work: Path,
    *,
    max_model_len: int | None = None,
    top_k: int | None = None,
    sets_name: str = SET_OPTION,
) -> Job:
    """The job over `windows`. `sets_name`: what messages call the request's settings.

    Raises ConfigError.
    """
    settings: dict[str, Any] = {
        "version": 1,
        "name": _slug(request.label),
        "task": "score",
        "input": {"path": str(windows), "id_column": ID, "keep_columns": [NUM_BYTES]},
        "prompt": {"token_ids_column": GIVEN},
        "score": {"completion_column": SCORED, "top_logprobs": top_k},
        "model": {
            "path": request.model,
            "quantization": request.quantization,
            "dtype": request.dtype,
            "max_model_len": max_model_len,
        },
        "engine": {"name": request.engine},
        "output": {"path": str(work / "output")},
    }
    sets = [f"{key}={json.dumps(value)}" for key, value in request.settings.items()]
    return job_from(settings, sets, sets_name=sets_name)


def _slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-._")[:60] or "perplexity"


def _write_job(job: Job, work: Path) -> None:
    _write(work / "job.yaml", json.dumps(job.model_dump(mode="json", exclude_defaults=True)))


def _write(path: Path, content: str) -> None:
    """As a whole: a folder with half of a job file would be taken for another's."""
    with os_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)
