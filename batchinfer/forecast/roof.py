"""The verdict on a run that has not been run: its schedule, simulated, as counted steps.

Must not know: rows, files, clocks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from batchinfer.engine.base import EngineFacts
from batchinfer.forecast.forecast import Lengths, simulate
from batchinfer.telemetry import Steps, Tally, Tokens
from batchinfer.telemetry.tally import FULL_SHARE
from batchinfer.verdict import Setup, Verdict, judge


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
