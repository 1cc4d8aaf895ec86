"""`try`: one prompt of a job as it is sent, and what the model makes of it, token by token.

Must not know: how a prompt or a completion is made. Invariant: nothing is written, and no output is
looked at.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from batchinfer.cli.answers import load_engine, show_stream, summary
from batchinfer.cli.next_steps import after_try, say_next
from batchinfer.cli.places import explained_places
from batchinfer.cli.quiet_engine import quiet_engine
from batchinfer.cli.source import JobSource
from batchinfer.cli.tokens import Screen, show_prompt
from batchinfer.cli.warned import held_warnings
from batchinfer.config import Job
from batchinfer.config.prompt import PROMPT_KINDS
from batchinfer.config.values import shown
from batchinfer.engine.kinds import engine_kind
from batchinfer.errors import ConfigError, Stopped
from batchinfer.model import ModelFacts, has_chat_template
from batchinfer.prompt import Prepared, RowPrompter
from batchinfer.runner.factory import engine_spec, model_of
from batchinfer.runner.one_prompt import OneRow, find_row, for_one, with_text
from batchinfer.runner.shown import ShownPrompts
from batchinfer.runner.stream import Stream
from batchinfer.tasks import task_of

logger = logging.getLogger("batchinfer.cli")

#: What a job without a file need not say where a text stands for a row.
_WITHOUT_INPUT: Mapping[str, Any] = {"input": {"path": "-"}}
#: Keys of `prompt` that only a conversation has.
_OF_CHATS = frozenset({"chat_template", "chat_template_kwargs", "continue_final_message"})
_WITHOUT_OUTPUT: Mapping[str, Any] = {"output": {"path": "-"}}


@dataclass(frozen=True, slots=True)
class TryOptions:
    """What the command line asks for. `row` and `prompt` None: the first row."""

    row: str | None
    prompt: str | None
    has_logprobs: bool = False


def try_job(source: JobSource, options: TryOptions) -> None:
    """Raises ConfigError, InputError, EngineDied, Stopped."""
    job = _load(source, options)
    demand = task_of(job).demand
    if demand.wants != "completion":
        raise ConfigError(
            f"try shows a completion, and task: {job.task} generates none: run some rows with "
            "--limit, and look at them with `batchinfer show`"
        )
    with explained_places(job, source.path):
        model = model_of(job)
        for note in model.warnings:
            logger.warning("%s", note)
        spec = engine_spec(for_one(job), model)
        kind = engine_kind(job.engine.name)
        kind.check_fit(spec)
        kind.prepare(spec)
        job, row = _one_row(job, model, source, options)
    prompter = task_of(job).prompter(job, model)
    if row is None:
        with explained_places(job, source.path):
            row = find_row(job, options.row, prompter.columns)
    prepared = row.prepared(prompter)
    ShownPrompts(prompter).show(row.shard or "--prompt", [row.number], prepared)
    work = task_of(job).work(row.work_item(prepared), model.max_model_len)
    with held_warnings(), quiet_engine() as quiet:
        screen = Screen(quiet.stdio.out)
        _show_row(screen, row, prepared, prompter, job, model)
        engine = load_engine(spec, quiet)
        try:
            screen.line("\nanswer", bold=True)
            (ask,) = work.asks()
            if not quiet.stop.begin_admission():
                raise Stopped(quiet.stop.reason, quiet.stop.code)
            stream = Stream(engine, ask, 0, lambda: quiet.stop.is_requested)
            completion = show_stream(
                stream, prompter.encoder, screen, has_logprobs=options.has_logprobs
            )
            if quiet.stop.is_requested:
                raise Stopped(f"{quiet.stop.reason}: the answer was abandoned", quiet.stop.code)
            assert completion is not None
            screen.line(summary(completion, stream.pace, engine), dim=True)
            say_next(quiet.stdio.out, quiet.stdio.err, after_try(source))
        finally:
            engine.close()


def _show_row(
    screen: Screen,
    row: OneRow,
    prepared: Prepared,
    prompter: RowPrompter,
    job: Job,
    model: ModelFacts,
) -> None:
    if row.shard:
        left_out = ", which input.filter leaves out" if row.is_left_out else ""
        screen.line(f"row      {row}{left_out}", bold=True)
    most, own = prompter.limit.max_tokens, None
    if prepared.own is not None:
        own = prepared.own[0]
        most = model.max_model_len - own.sampling.max_tokens
    if own is not None:
        for name, column in job.sampling.per_row.columns.items():
            value = row.table.column(column)[0].as_py()
            said = "null: the job's own" if value is None else shown(value)
            screen.line(f"         {name} from column {column}: {said}")
    if job.sampling.n > 1:
        screen.line(f"sample   1 of {job.sampling.n}", bold=True)
    screen.line(f"prompt   {len(prepared.token_ids):,} tokens of {most:,} that fit", bold=True)
    show_prompt(screen, prompter.encoder, prepared.token_ids)


def _load(source: JobSource, options: TryOptions) -> Job:
    """The job, with logprobs if they are to be shown."""
    otherwise = dict(_WITHOUT_OUTPUT)
    if options.prompt is not None:
        otherwise |= _WITHOUT_INPUT
        said = source.said_of("prompt")
        if not _is_kind_said(said):
            otherwise["prompt"] = {"messages_column" if said & _OF_CHATS else "column": "-"}
    job = source.load(otherwise).job
    if options.has_logprobs and job.sampling.logprobs is None:
        source = replace(source, sets=(*source.sets, "sampling.logprobs=0"))
        job = source.load(otherwise).job
    return job


def _one_row(
    job: Job, model: ModelFacts, source: JobSource, options: TryOptions
) -> tuple[Job, OneRow | None]:
    """The job whose prompt is the text that was given, and the row of that; None: not given."""
    if options.prompt is None:
        return job, None
    is_chat = job.prompt.messages is not None or job.prompt.messages_column is not None
    if source.path is None and not _is_kind_said(source.said_of("prompt")):
        is_chat = is_chat or has_chat_template(Path(model.tokenizer_path))
    return with_text(job, options.prompt, is_chat=is_chat)


def _is_kind_said(said: frozenset[str]) -> bool:
    """Whether it is said what a prompt is made of. `said`: keys of `prompt`."""
    return not said.isdisjoint(("", *PROMPT_KINDS))
