"""An answer as it comes, on a screen: what `try` and `chat` share.

Must not know: jobs' files, what was asked.
"""

from __future__ import annotations

import math

import numpy as np

from batchinfer.cli.quiet_engine import Quiet
from batchinfer.cli.tokens import Pieces, Screen
from batchinfer.engine.base import Engine, EngineSpec, StreamingEngine
from batchinfer.engine.demands.completion import Completion
from batchinfer.engine.kinds import engine_kind
from batchinfer.errors import InputError, RowError
from batchinfer.prompt.encode import TokenEncoder
from batchinfer.runner import WholeProcess
from batchinfer.runner.factory import build_engine
from batchinfer.runner.stream import Pace, Stream


def load_engine(spec: EngineSpec, quiet: Quiet) -> Engine:
    """The engine, after the kind's `prepare`; on a terminal the phases are shown meanwhile."""
    kind, tuning, err = engine_kind(spec.job.engine.name), WholeProcess(), quiet.stdio.err
    screen = Screen(err)

    def report(phase: str) -> None:
        if screen.has_colours:
            err.write(f"\r\x1b[K\x1b[2m{phase} …\x1b[0m")
            err.flush()

    report("importing the engine")
    tuning.importing()
    kind.load()
    tuning.imported()
    report("loading the model")
    try:
        with kind.phases(report):
            return build_engine(kind, spec)
    finally:
        if screen.has_colours:
            err.write("\r\x1b[K")
            err.flush()


def show_stream(
    stream: Stream, encoder: TokenEncoder, screen: Screen, *, has_logprobs: bool = False
) -> Completion | None:
    """The completion as it comes; what there was of it, None: nothing.

    Raises InputError if the engine refuses the prompt.
    """
    completion = None
    pieces, shown = Pieces(encoder), []
    try:
        for completion in stream:
            for piece in pieces.of(completion):
                shown.append(piece)
                if piece.is_special:
                    screen.special(piece.text)
                else:
                    screen.token(piece.text, piece.logprob if has_logprobs else None)
    except RowError as error:
        raise InputError(f"{error.kind}: {error.message}") from error
    if completion is not None and completion.finish_reason is not None:
        screen.write(pieces.rest(text_of(completion, encoder)))
    screen.line()
    if has_logprobs:
        if screen.has_colours:
            screen.legend()
        else:
            for piece in shown:
                screen.line(f"{math.exp(piece.logprob or 0.0):.3f}  {piece.text!r}")
    return completion


def text_of(completion: Completion, encoder: TokenEncoder) -> str:
    """The answer, without the thought."""
    if completion.is_reasoning_cut:
        return ""
    if completion.text is not None:
        return completion.text
    ids = completion.token_ids[: completion.num_text_tokens]
    return encoder.decode(ids, np.array([0, len(ids)]))[0]


def summary(completion: Completion, pace: Pace, engine: Engine) -> str:
    """How fast, and why it ended."""
    num_tokens = len(completion.token_ids)
    seconds = max(1e-9, (pace.last_s or pace.begun_s) - pace.begun_s)
    text = f"{num_tokens:,} tokens in {seconds:.2f} s: {num_tokens / seconds:,.0f} tokens/s"
    if isinstance(engine, StreamingEngine) and pace.first_s is not None:
        text += f", the first after {pace.first_s - pace.begun_s:.2f} s"
    if completion.is_reasoning_cut:
        text += "; it ended within its thought"
    elif completion.reasoning is not None:
        text += (
            f"; a thought of {len(completion.reasoning):,} characters and an answer of "
            f"{len(completion.text or ''):,}"
        )
    if completion.finish_reason is None:
        return f"{text}; stopped"
    if completion.finish_reason == "length":
        return f"{text}; cut at sampling.max_tokens"
    if completion.stop_reason is None:
        return f"{text}; the model ended it"
    return f"{text}; ended by {completion.stop_reason!r}"
