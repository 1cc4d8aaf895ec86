"""Perplexity of a model on a text: windows -> a score job -> its finished output -> a record.

The windows are the rows of the job, so a killed evaluation goes on at the windows that are missing.
Must not know: how an engine is driven, terminals.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from batchinfer import __version__
from batchinfer.api import run
from batchinfer.config import Job, job_from
from batchinfer.config.load import SET_OPTION
from batchinfer.errors import ConfigError
from batchinfer.evaluation.bits import StoredBits, stored_bits
from batchinfer.evaluation.folders import check_begun, check_work
from batchinfer.evaluation.intervals import Float64Array, ratio_interval
from batchinfer.evaluation.outputs import Output, logprobs_of, read_output, refuse_failed
from batchinfer.evaluation.record import Record, Request
from batchinfer.evaluation.reference import (
    Closeness,
    check_reference,
    closeness,
    open_reference,
)
from batchinfer.evaluation.settings import check_settings
from batchinfer.evaluation.texts import text_of
from batchinfer.evaluation.windows import (
    GIVEN,
    ID,
    NUM_BYTES,
    SCORED,
    Windows,
    num_tokens_of,
    stream_of,
    write_windows,
)
from batchinfer.model import ModelFacts
from batchinfer.prompt.encode import TokenEncoder
from batchinfer.runner.factory import model_of
from batchinfer.storage.local_errors import os_errors
from batchinfer.tasks.scoring_windows import MAX_LOGPROB

#: exp() of more is no number. A model that guesses has log(vocabulary), about 12.
_MAX_NLL = 700.0


def measure(request: Request, *, work: Path, restart: bool = False) -> Record:
    """What `request` asks for, computed where it is not yet.

    `work`: a folder of this request's own; its windows, the job, the job's output and the record
    are kept there, so a call after an interruption goes on, and one after the end computes nothing.
    `restart`: delete that output first. The engine runs in this process and holds its memory until
    the process ends. Raises what `batchinfer.run` raises: ConfigError and InputError for what
    cannot be measured.
    """
    check_settings(request.settings)
    check_work(work)
    model = model_of(score_job(request, work / "windows", work))
    check_windows(request, model.max_model_len)
    encoder = TokenEncoder(
        model.tokenizer_path,
        trust_remote_code=bool(request.settings.get("model.trust_remote_code")),
    )
    windows = _windows(request, work, encoder)
    is_begun = check_begun(work, windows.path, restart=restart)
    check_vocabulary(windows, model)
    reference = None
    if request.reference is not None:
        reference = open_reference(request.reference)
        check_reference(reference, windows.path, model)
    # One more than a window: the engine generates a token for each, which is dropped.
    max_model_len = min(request.context + 1, model.max_model_len)
    top_k = request.top_k or (reference.job["score"]["top_logprobs"] if reference else None)
    job = score_job(request, windows.path, work, max_model_len=max_model_len, top_k=top_k)
    if not is_begun:
        _write_job(job, work)
    run(job, restart=restart, retry_failed=True)
    if is_begun:  # not before: it may be another measurement's, which is refused
        _write_job(job, work)
    output = read_output(job.output.path)
    found = Found(
        windows=windows,
        output=output,
        bits=stored_bits(model, output),
        tokenizer_digest=vocabulary_digest(encoder),
        closeness=closeness(reference, output) if reference else None,
    )
    record = _record(request, found)
    _write(work / "record.json", record.model_dump_json(indent=2) + "\n")
    return record


def check_windows(request: Request, max_model_len: int) -> None:
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


def check_vocabulary(windows: Windows, model: ModelFacts) -> None:
    """Raise ConfigError for a token that the model does not have."""
    if windows.max_token_id >= model.vocab_size:
        raise ConfigError(
            f"the tokenizer in {model.tokenizer_path} gives token id {windows.max_token_id}, the "
            f"model {model.path} has a vocabulary of {model.vocab_size}: they do not belong "
            "together, give the model's own tokenizer"
        )


def vocabulary_digest(encoder: TokenEncoder) -> str:
    """sha256 of the tokens and their ids, however their file is written."""
    vocabulary = json.dumps(sorted(encoder.vocabulary.items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()


def _windows(request: Request, work: Path, encoder: TokenEncoder) -> Windows:
    max_tokens = None
    if request.max_rows is not None:
        max_tokens = num_tokens_of(request.max_rows, request.context, request.stride)
    stream = stream_of(text_of(request.data, request.column), encoder, max_tokens)
    return write_windows(stream, request.context, request.stride, work / "windows")


def score_job(
    request: Request,
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


@dataclass(frozen=True, slots=True)
class Totals:
    """Totals of each row of a score output, in order. `num_bytes` is 0 where it is unknown."""

    nll: Float64Array  # [n], nats: the sum over the row's scored tokens
    num_tokens: Float64Array  # [n], scored
    num_bytes: Float64Array  # [n]


def totals_of(output: Output, bytes_column: str) -> Totals:
    """Raises InputError for failed or damaged rows, ConfigError for another task's output."""
    if output.task != "score":
        raise ConfigError(f"{output.url} is of task {output.task}, not of score")
    refuse_failed(output)
    parts = []
    for table in output.tables(["row", "cumulative_logprob", "num_scored_tokens", bytes_column]):
        num_bytes = table[bytes_column].fill_null(0).to_numpy().astype(np.float64)
        parts.append((*logprobs_of(output, table), num_bytes))
    logprob, num_tokens, num_bytes = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Totals(-logprob, num_tokens, num_bytes)


def mean_nll(totals: Totals, what: str) -> float:
    """The mean over tokens, in nats. Raises ConfigError if that gives no perplexity."""
    num_tokens = totals.num_tokens.sum()
    if not num_tokens:
        raise ConfigError(f"{what} has no scored token")
    nll = math.fsum(totals.nll) / float(num_tokens)
    if not -MAX_LOGPROB <= nll < _MAX_NLL:
        raise ConfigError(
            f"{what}: the mean negative log-likelihood of a token is {nll}, which no working model "
            "has: its weights or its quantization are damaged"
        )
    return nll


@dataclass(frozen=True, slots=True)
class Found:
    """All that a record is made of."""

    windows: Windows
    output: Output
    bits: StoredBits
    tokenizer_digest: str
    closeness: Closeness | None  # to the reference


def _record(request: Request, found: Found) -> Record:
    windows, output, near = found.windows, found.output, found.closeness
    totals = totals_of(output, NUM_BYTES)
    nll = mean_nll(totals, request.label)
    interval = ratio_interval(totals.nll, totals.num_tokens)
    low, high = (None, None) if interval is None else (math.exp(bound) for bound in interval)
    engine = output.engine
    quantization = str(output.model.get("quantization", request.quantization))
    dtype = str(engine.get("dtype") or output.model["dtype"])
    return Record(
        label=request.label,
        family=request.family or _family(request, quantization, dtype),
        model=request.model,
        quantization=quantization,
        dtype=dtype,
        engine=" ".join(str(engine[key]) for key in ("name", "version") if key in engine) or None,
        device=engine.get("device"),
        data=request.data,
        context=request.context,
        stride=request.stride,
        windows=windows.num_windows,
        tokens=int(totals.num_tokens.sum()),
        bytes_of_text=windows.num_bytes or None,
        nll=nll,
        perplexity=math.exp(nll),
        perplexity_low=low,
        perplexity_high=high,
        bits_per_byte=bits_per_byte(totals),
        layer_bits_per_weight=found.bits.layers,
        head_bits_per_weight=found.bits.head,
        model_bytes=found.bits.num_bytes,
        peak_memory_bytes=((engine.get("extra") or {}).get("layers") or {}).get("peak_bytes"),
        tokens_per_s=output.tokens_per_s(),
        kl=near.kl if near else None,
        kl_top_k=near.top_k if near else None,
        top1_agreement=near.top1_agreement if near else None,
        reference=request.reference,
        tokenizer_digest=found.tokenizer_digest,
        data_digest=windows.digest,
        batchinfer_version=__version__,
    )


def _family(request: Request, quantization: str, dtype: str) -> str:
    if request.quantization not in ("auto", "none"):
        return request.quantization
    return dtype if quantization == "none" else quantization


def bits_per_byte(totals: Totals) -> float | None:
    """Bits for each byte of the scored text; None where its bytes are unknown."""
    num_bytes = totals.num_bytes.sum()
    return float(math.fsum(totals.nll) / math.log(2) / num_bytes) if num_bytes else None


def _write_job(job: Job, work: Path) -> None:
    _write(work / "job.yaml", json.dumps(job.model_dump(mode="json", exclude_defaults=True)))


def _write(path: Path, content: str) -> None:
    """As a whole: a folder with half of a job file would be taken for another's."""
    with os_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)
