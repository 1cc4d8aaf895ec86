"""How long the rows that are left will take: the engine's schedule, simulated with the lengths of
measured rows.

A step's time is taken as a + b * (sequences that decode) + c * (prompt tokens that are read), and
a schedule as the sums of those three over its steps. Fitted on the steps of a measurement, whose
schedule is simulated as well, then applied to the simulated schedule of what is left: a few rows
fill the engine less than a run does, and end in a tail that a run has only once. Must not know:
engines, rows, files.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from batchinfer.engine.base import EngineFacts
from batchinfer.plan.order import by_length

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

#: More requests than this are extrapolated from the second half of this many: steady state.
MAX_SIMULATED_REQUESTS = 16384
_NUM_RESAMPLES = 20
_RANGE_PERCENT = (5, 95)
#: A row gets the completion of a measured row of about its length: one of this many to either side.
_NUM_NEIGHBOURS = 3


@dataclass(frozen=True, slots=True)
class Lengths:
    """Requests in order of admission. [num_requests] each, in tokens"""

    prompt: Int64Array
    uncached: Int64Array  # of the prompt: what the prefix cache did not have
    completion: Int64Array

    def take(self, indices: Int64Array) -> Lengths:
        return Lengths(self.prompt[indices], self.uncached[indices], self.completion[indices])


@dataclass(frozen=True, slots=True)
class Wave:
    """Requests that were really run, admitted at once, and how long each step took."""

    lengths: Lengths
    step_s: Float64Array  # [num_steps]


@dataclass(frozen=True, slots=True)
class Interval:
    """An expected value and the range that the choice of measured rows leaves open."""

    expected: float
    low: float
    high: float

    def plus(self, constant: float) -> Interval:
        return Interval(self.expected + constant, self.low + constant, self.high + constant)

    def times(self, factor: float) -> Interval:
        return Interval(self.expected * factor, self.low * factor, self.high * factor)

    def at_least(self, bound: float) -> Interval:
        return Interval(max(bound, self.expected), max(bound, self.low), max(bound, self.high))


@dataclass(frozen=True, slots=True)
class Forecast:
    """What all requests that are left take together."""

    prompt_tokens: float
    completion_tokens: Interval
    generation_s: Interval


def simulate(lengths: Lengths, facts: EngineFacts) -> Int64Array:
    """The schedule as stretches of equal steps: (steps, sequences decoded, prompt tokens read).

    Sequences are counted once a step. First come, first served, as vLLM's scheduler does it: what
    decodes goes first, the rest of the step's token budget reads prompts, the last one in pieces.
    A sequence takes room in the KV cache for its prompt and half of its completion, its mean.
    [num_stretches, 3]
    """
    num_requests = len(lengths.prompt)
    uncached = np.maximum(1, lengths.uncached).tolist()  # the last token is always computed
    completion = np.maximum(1, lengths.completion).tolist()
    room = (lengths.prompt + lengths.completion // 2).tolist()
    free_tokens = facts.kv_cache_tokens if facts.kv_cache_tokens is not None else 1 << 62
    decoding: list[tuple[int, int]] = []  # (number of its last step, request)
    stretches: list[tuple[int, int, int]] = []
    step = next_request = num_unread = 0  # of the prompt that is being read
    while next_request < num_requests or num_unread or decoding:
        budget = max(1, facts.max_num_batched_tokens - len(decoding))
        num_read = 0
        read: list[int] = []  # requests whose prompt ends in this step: it brings their first token
        while num_read < budget:
            if not num_unread:
                if (
                    next_request == num_requests
                    or len(decoding) + len(read) == facts.max_num_seqs
                    or (free_tokens < room[next_request] and (decoding or read))
                ):
                    break
                num_unread = uncached[next_request]
                free_tokens -= room[next_request]
                next_request += 1
            taken = min(num_unread, budget - num_read)
            num_read += taken
            num_unread -= taken
            if not num_unread:
                read.append(next_request - 1)
        # Nothing to read: the same step again until a sequence ends.
        num_steps = 1 if num_read else decoding[0][0] - step
        stretches.append((num_steps, num_steps * len(decoding), num_read))
        step += num_steps
        for request in read:
            heapq.heappush(decoding, (step + completion[request] - 1, request))
        while decoding and decoding[0][0] <= step:
            free_tokens += room[heapq.heappop(decoding)[1]]
    return np.array(stretches, dtype=np.int64).reshape(-1, 3)


@dataclass(frozen=True, slots=True)
class RemainingRows:
    """What is left of a job, and in which order it will come."""

    num_rows: int
    num_samples: int
    prompt_tokens: Int64Array  # [num_prompts] lengths of some of the rows, or of all
    is_longest_first: bool
    chunk_rows: int  # rows that are put in order together


def forecast(waves: Sequence[Wave], facts: EngineFacts, left: RemainingRows) -> Forecast:
    """What is left will take. The samples of a row are next to each other in `waves`.

    The range comes from doing it again with rows drawn again from the measured ones, and with
    steps that miss the fit as far as they did, to either side (wild bootstrap).
    """
    measured = concatenated([wave.lengths for wave in waves])
    counts, step_s = _measured_steps(waves, facts)
    random = np.random.default_rng(0)

    # The first step also pays for whatever an engine does once.
    first = min(1, len(step_s) - 1)
    fitted = _least_squares(counts[first:], step_s[first:])
    misses_s = step_s - counts @ fitted

    def estimate(rows: Int64Array, seconds: Float64Array) -> tuple[float, float]:
        """(mean completion tokens, seconds) of a job with rows like these."""
        chunks = _draw(measured, rows, left, random)
        drawn = concatenated(chunks)
        total = simulate(drawn, facts).sum(axis=0).astype(np.float64)
        num_missing = left.num_rows * left.num_samples - len(drawn.prompt)
        if num_missing:
            # The second half alone: what the first had of ramp and tail cancels.
            steady = total - simulate(chunks[0], facts).sum(axis=0)
            total += steady * (num_missing / len(chunks[1].prompt))
        return float(drawn.completion.mean()), float(total @ seconds)

    rows = np.arange(0, len(measured.prompt), left.num_samples)  # the first request of each
    completion_tokens, generation_s = estimate(rows, fitted)
    resampled = []
    for _ in range(_NUM_RESAMPLES):
        again_s = step_s - misses_s + misses_s * random.choice([-1, 1], len(step_s))
        seconds = _least_squares(counts[first:], again_s[first:])
        resampled.append(estimate(random.choice(rows, len(rows)), seconds))
    completions, times_s = np.array(resampled).T
    num_requests = left.num_rows * left.num_samples
    return Forecast(
        prompt_tokens=float(left.prompt_tokens.mean()) * num_requests,
        completion_tokens=_estimate(completion_tokens, completions).times(num_requests),
        generation_s=_estimate(generation_s, times_s).plus(max(0.0, float(misses_s[0]))),
    )


def _measured_steps(waves: Sequence[Wave], facts: EngineFacts) -> tuple[Float64Array, Float64Array]:
    """What each step had to do [num_steps, 3], and the seconds it took [num_steps].

    Where the engine took another number of steps than the simulation (several tokens a step, empty
    steps of an asynchronous scheduler) the simulated schedule is stretched over them.
    """
    counts = []
    for wave in waves:
        stretches = simulate(wave.lengths, facts)
        total = np.vstack([np.zeros((1, 3)), np.cumsum(stretches, axis=0)])
        ends = np.linspace(0, total[-1, 0], len(wave.step_s) + 1)
        at_ends = np.column_stack([np.interp(ends, total[:, 0], column) for column in total.T])
        counts.append(np.diff(at_ends, axis=0))
    return np.concatenate(counts), np.concatenate([wave.step_s for wave in waves])


def _draw(
    measured: Lengths, rows: Int64Array, left: RemainingRows, random: np.random.Generator
) -> list[Lengths]:
    """Requests of what is left, chunk by chunk in order of admission; two equal halves if it is
    much.

    Prompts are as long as the known ones, completions as those of measured rows of such a length.
    """
    rows = rows[np.argsort(measured.prompt[rows], kind="stable")]
    known = measured.prompt[rows]
    num_rows = min(left.num_rows, max(2, MAX_SIMULATED_REQUESTS // left.num_samples))
    prompts = np.resize(random.permutation(left.prompt_tokens), num_rows)
    chunk_rows = left.chunk_rows if num_rows == left.num_rows else -(-num_rows // 2)
    chunks = []
    for start in range(0, num_rows, chunk_rows):
        chunk = prompts[start : start + chunk_rows]
        if left.is_longest_first:
            chunk = chunk[by_length(chunk)]
        low = np.searchsorted(known, chunk, side="left") - _NUM_NEIGHBOURS
        high = np.searchsorted(known, chunk, side="right") + _NUM_NEIGHBOURS
        row = rows[np.clip(random.integers(low, high), 0, len(rows) - 1)]
        like = measured.take((row[:, None] + np.arange(left.num_samples)).ravel())
        prompt = np.repeat(chunk, left.num_samples)
        chunks.append(Lengths(prompt, like.uncached * prompt // like.prompt, like.completion))
    return chunks


def concatenated(parts: Sequence[Lengths]) -> Lengths:
    return Lengths(
        np.concatenate([part.prompt for part in parts]),
        np.concatenate([part.uncached for part in parts]),
        np.concatenate([part.completion for part in parts]),
    )


def _estimate(expected: float, resampled: Float64Array) -> Interval:
    low, high = np.percentile(resampled, _RANGE_PERCENT).tolist()
    return Interval(expected, min(low, expected), max(high, expected))


def _least_squares(counts: Float64Array, step_s: Float64Array) -> Float64Array:
    """The best non-negative coefficients: of all choices of columns, as there are only three."""
    best, best_error = np.zeros(counts.shape[1]), np.inf
    columns = range(counts.shape[1])
    for size in range(1, counts.shape[1] + 1):
        for chosen in map(list, combinations(columns, size)):
            found = np.linalg.lstsq(counts[:, chosen], step_s)[0]
            error = float(np.sum((counts[:, chosen] @ found - step_s) ** 2))
            if (found >= 0).all() and error < best_error:
                best, best_error = np.zeros(counts.shape[1]), error
                best[chosen] = found
    return best
