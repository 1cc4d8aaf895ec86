"""What a run would find: rows and windows of the input, what is done of them, what is left.

Decides nothing itself: the digest and the size of windows are those of the start's decision, as a
run's are. Must not know: prompts, engines, click.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from batchinfer.forecast.predict import RemainingWork
from batchinfer.forecast.sample import Sample
from batchinfer.ledger import Results, Survey
from batchinfer.runner.decide import Complete, Restart, Resume
from batchinfer.runner.start import Start
from batchinfer.source import Shard


@dataclass(frozen=True, slots=True)
class Work:
    """Of a whole input. How many rows of a shard pass the filter is known once its file is
    finished; until then all count.
    """

    shards: Sequence[tuple[Shard, int]]  # with their numbers of rows, before the filter
    window_rows: int
    num_samples: int
    finished: Set[str]  # names of shards
    num_finished: int  # results in their files
    num_in_parts: int  # results of the others

    @property
    def num_rows(self) -> int:
        return sum(size for _, size in self.shards)

    @property
    def num_windows(self) -> int:
        return sum(-(-size // self.window_rows) for _, size in self.shards)

    @property
    def left(self) -> list[tuple[Shard, int]]:
        """Shards that are not finished."""
        return [(shard, size) for shard, size in self.shards if shard.name not in self.finished]

    @property
    def num_rows_left(self) -> int:
        return sum(size for _, size in self.left)

    @property
    def num_results(self) -> int:
        return self.num_rows_left * self.num_samples + self.num_finished

    @property
    def num_done(self) -> int:
        return self.num_finished + self.num_in_parts

    @property
    def is_done(self) -> bool:
        """Whether that follows without the share of rows that pass the filter."""
        return self.num_rows_left * self.num_samples <= self.num_in_parts

    def rest(self, sample: Sample, ready_s: float) -> RemainingWork:
        """What is left of work that is not done. `sample`: of the shards that are left."""
        num_rows = self.num_rows_left
        num_expected = round(num_rows * sample.passing_share) * self.num_samples
        return RemainingWork(
            num_results=num_expected - self.num_in_parts,
            chunk_rows=min(self.window_rows, -(-num_rows // len(self.left))),
            ready_s=ready_s,
        )


def read_work(
    start: Start,
    shards: Sequence[tuple[Shard, int]],
    survey: Survey,
    decision: Complete | Resume,
) -> Work:
    """Count the results of the files that `survey` found; none if they are to be deleted."""
    names = {shard.name for shard, _ in shards}
    is_deleted = isinstance(decision, Restart)
    finished = frozenset() if is_deleted else names & survey.finished
    in_parts = frozenset() if is_deleted else names & survey.with_parts - finished
    results = Results(start.store, decision.digest)
    return Work(
        shards=shards,
        window_rows=decision.window_rows,
        num_samples=start.task.num_samples,
        finished=finished,
        num_finished=sum(results.totals_of(name).rows for name in sorted(finished)),
        num_in_parts=sum(results.num_rows_of_parts(name) for name in sorted(in_parts)),
    )
