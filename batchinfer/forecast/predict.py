"""From rows that were run to what the rest of a job takes: tokens, time, cost.

Must not know: how it is printed, how rows were run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from batchinfer.config import Job
from batchinfer.forecast.forecast import Interval, RemainingRows, forecast
from batchinfer.forecast.measure import MIN_ROWS, Measurement
from batchinfer.forecast.sample import Sample
from batchinfer.tasks import task_of


@dataclass(frozen=True, slots=True)
class RemainingWork:
    """What a run would find."""

    num_results: int  # not done yet, estimated with the share that passes the filter
    chunk_rows: int  # of a window of a shard
    ready_s: float  # from the start of the process to the tokenizer in memory


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the rest takes, from the command to the end of its process."""

    left: RemainingRows
    prompt_tokens: float
    completion_tokens: Interval
    start_s: float
    generation_s: Interval
    close_s: float
    num_replicas: int = 1  # that share the rows, each as fast as the one that was measured

    @property
    def total_s(self) -> Interval:
        return self.generation_s.plus(self.start_s + self.close_s)

    def cost(self, price_per_hour: float) -> Interval:
        """In the currency of the price."""
        return self.total_s.times(price_per_hour / 3600)

    @property
    def completion_tokens_per_s(self) -> float:
        return self.completion_tokens.expected / self.generation_s.expected

    @property
    def tokens_per_s(self) -> float:
        """With those of prompts."""
        return (self.prompt_tokens + self.completion_tokens.expected) / self.generation_s.expected

    def is_guess(self, num_measured: int) -> bool:
        """Whether so few rows were measured that their spread says nothing."""
        return num_measured < min(MIN_ROWS, self.left.num_rows)

    def extrapolated_width(self, measurement: Measurement, num_measured: int) -> int | None:
        """Sequences that a run has at a time, if that is more than were measured."""
        num_each = -(-self.left.num_rows * self.left.num_samples // self.num_replicas)
        width = min(num_each, measurement.facts.max_num_seqs)
        is_more = measurement.max_running < width and num_measured < self.left.num_rows
        return width if is_more else None


def predict(
    job: Job,
    sample: Sample,
    rest: RemainingWork,
    measurement: Measurement,
    num_replicas: int = 1,
) -> Prediction:
    """`measurement`: of the sample's prompts, by one of `num_replicas` alike. Reading is beside the
    engine, and may be slower.
    """
    num_samples = task_of(job).num_samples
    num_rows = -(-rest.num_results // num_samples)
    chunk_tokens = float(sample.lengths.mean()) * rest.chunk_rows
    left = RemainingRows(
        num_rows=max(1, round(num_rows * sample.prompt_share / sample.passing_share)),
        num_samples=num_samples,
        prompt_tokens=sample.lengths,
        is_longest_first=job.packing.order == "length",
        chunk_rows=max(
            1, round(rest.chunk_rows * min(1.0, job.packing.buffer_tokens / chunk_tokens))
        ),
    )
    num_each = -(-left.num_rows // num_replicas)
    found = forecast(measurement.waves, measurement.facts, replace(left, num_rows=num_each))
    scale = left.num_rows / num_each
    row_s = sample.prepare_s / sample.num_read
    # The first chunk is read beside the import of the engine, the others while rows are run.
    first_chunk_s = row_s * min(num_rows, left.chunk_rows)
    return Prediction(
        left=left,
        prompt_tokens=found.prompt_tokens * scale,
        completion_tokens=found.completion_tokens.times(scale),
        start_s=rest.ready_s + max(measurement.load_s, first_chunk_s) + measurement.build_s,
        generation_s=found.generation_s.at_least(row_s * num_each),
        close_s=measurement.close_s,
        num_replicas=num_replicas,
    )
