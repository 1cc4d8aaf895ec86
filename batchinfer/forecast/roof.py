"""The verdict on a run that has not been run: its schedule, simulated, as counted steps.

Where no row was run, its seconds are those of the roof: then its rate is the most that the device
can do. Must not know: rows, files, clocks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from batchinfer.engine.base import EngineFacts
from batchinfer.forecast.forecast import Int64Array, Lengths, concatenated, simulate
from batchinfer.forecast.measure import Measurement
from batchinfer.forecast.predict import Prediction
from batchinfer.telemetry import Steps, Tally, Tokens
from batchinfer.telemetry.tally import FULL_SHARE
from batchinfer.verdict import Setup, Verdict, judge

#: A few times the widest step: more change little, and each is simulated.
_MOST_REQUESTS = 4096


def roof_of(
    prompts: Int64Array, num_requests: int, max_tokens: int, facts: EngineFacts, setup: Setup
) -> Verdict | None:
    """The most that the device can do if each completion has `max_tokens`, as far as the context
    goes. `prompts`: lengths of some. None if peaks or the model's work are unknown.
    """
    prompt = np.resize(prompts, max(1, min(num_requests, _MOST_REQUESTS)))
    completion = np.clip(facts.max_model_len - prompt, 1, max_tokens)
    return foreseen(Lengths(prompt, prompt, completion), facts, setup)


def verdict_of(measurement: Measurement, found: Prediction, setup: Setup) -> Verdict | None:
    """On what is left, with lengths of rows that were measured, in the time that was predicted.
    None if peaks or the model's work are unknown.
    """
    measured = concatenated([wave.lengths for wave in measurement.waves])
    num_requests = -(-found.left.num_rows * found.left.num_samples // found.num_replicas)
    num_drawn = min(num_requests, _MOST_REQUESTS)
    rows = np.random.default_rng(0).integers(0, len(measured.prompt), num_drawn)
    seconds = found.generation_s.expected * num_drawn / num_requests
    verdict = foreseen(measured.take(rows), measurement.facts, setup, seconds)
    return verdict and replace(verdict, tokens_per_s=found.completion_tokens_per_s)


def foreseen(
    lengths: Lengths, facts: EngineFacts, setup: Setup, seconds: float | None = None
) -> Verdict | None:
    """Of requests in order of admission that take `seconds`; None: as long as the roof says, so
    that its tokens/s are the most that the device can do. None if the roof is unknown, too.
    """
    steps, tokens = steps_of(lengths, facts), tokens_of(lengths)
    roofs = [judge([s], tokens, setup, tokens_per_s=0.0, host_s=0.0, stalled_s=0.0) for s in steps]
    shares = [r.share_of_roof if r is not None else None for r in roofs]
    if any(share is None for share in shares):
        return None
    roof_s = np.array(shares, dtype=np.float64)  # of a second each
    scale = 1.0 if seconds is None else seconds / roof_s.sum()
    timed = [replace(s, seconds=scale * r) for s, r in zip(steps, roof_s.tolist(), strict=True)]
    rate = tokens.completion / (scale * float(roof_s.sum()))
    return judge(timed, tokens, setup, tokens_per_s=rate, host_s=0.0, stalled_s=0.0)


def steps_of(lengths: Lengths, facts: EngineFacts) -> list[Steps]:
    """What the scheduler would run, each stretch of equal steps with a second."""
    stretches = simulate(lengths, facts)
    reads = np.flatnonzero(stretches[:, 2])
    last_read = int(reads[-1]) if len(reads) else -1
    steps = []
    for index, (num_steps, decoded, read) in enumerate(stretches.tolist()):
        running = decoded + min(num_steps, read)  # that read a prompt: at least one
        found = Steps("full", num_steps, running, decoded + read, 1.0)
        if running < FULL_SHARE * facts.max_num_seqs * num_steps and (
            decoded + read < FULL_SHARE * facts.max_num_batched_tokens * num_steps
        ):
            found.kind = "short" if index < last_read else "tail"
        steps.append(found)
    return steps


def tokens_of(lengths: Lengths) -> Tokens:
    tally = Tally()
    columns = (lengths.prompt, lengths.prompt - lengths.uncached, lengths.completion)
    for prompt, cached, completion in zip(*(column.tolist() for column in columns), strict=True):
        tally.add_answer(prompt, cached, completion)
    return tally.tokens
