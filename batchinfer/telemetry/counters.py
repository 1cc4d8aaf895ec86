"""What a run has done so far: many threads add, `snapshot` reads.

Must not know: what a row holds, how anything is shown. Rows here are results: one for each (row,
sample). Invariant: a snapshot is one consistent moment, and taking it costs the adding threads next
to nothing.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batchinfer.telemetry.clock import Clock
from batchinfer.telemetry.sums import ReplicaLine, Sums, line_of
from batchinfer.telemetry.tally import Tally

#: The recent rate looks back this far, in samples of at least `_SAMPLE_S`.
WINDOW_S = 30.0
_SAMPLE_S = 0.5
#: Of fewer finished rows, while more are in flight, nothing is concluded for the others.
_ETA_ROWS = 8


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One moment of a run. `rows_total` is an estimate until all input is read."""

    phase: str
    rows_total: int | None
    rows_done_at_start: int  # found finished by earlier runs, as far as the input is read
    rows_computed: int  # by this run, errors and reused duplicates included
    rows_durable: int  # by this run; never more than computed
    rows_failed: int  # of rows_durable
    counts: Mapping[str, int]  # what the task counts in rows_durable
    shards_total: int
    shards_finished: int
    prompt_tokens: int
    result_tokens: int  # generated, or scored
    num_in_flight: int
    tokens_in_flight: int  # result tokens so far of what is in flight; counted now and then
    elapsed_s: float  # since the counters were made
    generation_s: float  # first admission to last finish, idle included
    tokens_per_s: float  # result tokens, those in flight too, over the last WINDOW_S
    mean_tokens_per_s: float  # result tokens over generation_s
    num_steps: int  # engine steps
    mean_num_running: float  # sequences in a step
    share_of_steps_underfilled: float  # of the steps while rows remained; see `add_step`
    stalled_s: float  # of generation_s, when the engine stood still for input or for storage
    eta_s: float | None
    replicas: Sequence[ReplicaLine] = ()  # none: this process computes by itself

    @property
    def rows_done(self) -> int:
        """Durable rows of this and earlier runs."""
        return self.rows_done_at_start + self.rows_durable


class Counters:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.tally = Tally()  # the engine's thread adds to it, without the lock
        self._lock = threading.Lock()
        self._started_s = clock.monotonic()
        self._phase = "starting"
        self._rows_input: int | None = None  # input rows x samples, before the filter
        self._rows_read = 0  # of those, read
        self._rows_expected = 0  # of those, past the filter
        self._rows_done_at_start = 0
        self._rows_computed = 0
        self._rows_durable = 0
        self._rows_failed = 0
        self._counts: Counter[str] = Counter()
        self._shards_total = 0
        self._shards_finished = 0
        self._prompt_tokens = 0
        self._result_tokens = 0
        self._num_in_flight = 0
        self._tokens_in_flight = 0
        self._max_tokens: int | None = None
        self._num_steps = 0
        self._num_running = 0  # summed over the steps
        self._num_steps_with_more = 0
        self._num_steps_underfilled = 0
        self._stalled_s = 0.0
        self._first_admission_s: float | None = None
        self._last_finish_s = self._started_s
        self._replicas: dict[str, tuple[Sums, int]] = {}  # by replica: so far, restarts
        self._samples: deque[tuple[float, int]] = deque()  # (monotonic s, result tokens by then)

    @property
    def clock(self) -> Clock:
        return self._clock

    def set_phase(self, phase: str) -> None:
        """What the run is busy with, for people: "reading", "loading the model", "computing"."""
        with self._lock:
            self._phase = phase

    def set_total(self, num_rows: int | None, num_shards: int) -> None:
        """What this run is to bring to an end: input rows x samples (None: not known), shards."""
        with self._lock:
            self._rows_input = num_rows
            self._shards_total = num_shards

    def add_read(self, num_rows: int, num_done: int, num_expected: int | None = None) -> None:
        """Rows read (x samples); how many of them are done, and pass the filter (None: all)."""
        with self._lock:
            self._rows_read += num_rows
            self._rows_expected += num_rows if num_expected is None else num_expected
            self._rows_done_at_start += num_done

    def set_in_flight(self, num_in_flight: int) -> None:
        with self._lock:
            self._num_in_flight = num_in_flight
            if self._first_admission_s is None and num_in_flight:
                self._first_admission_s = self._clock.monotonic()
                self._samples.append((self._first_admission_s, 0))

    def set_max_tokens(self, max_tokens: int | None) -> None:
        """The most tokens that a result can have; None: it depends on the row alone."""
        with self._lock:
            self._max_tokens = max_tokens

    def set_tokens_in_flight(self, num_tokens: int) -> None:
        """Result tokens so far of the rows in flight, at this moment."""
        with self._lock:
            self._tokens_in_flight = num_tokens
            self._add_sample(self._clock.monotonic())

    def add_step(self, num_running: int) -> None:
        """Count an engine step and the sequences in it."""
        with self._lock:
            self._num_steps += 1
            self._num_running += num_running

    def add_steps_with_more(self, num_steps: int, num_underfilled: int) -> None:
        """The number of steps after which another row was admitted: rows were left that were
        not in the engine yet. Underfilled: it could have run at least a tenth more of them.
        """
        with self._lock:
            self._num_steps_with_more += num_steps
            self._num_steps_underfilled += num_underfilled

    def add_stalled(self, seconds: float) -> None:
        """Time in which the engine's thread waited for input, or for the writer."""
        with self._lock:
            self._stalled_s += seconds

    def add_computed(self, num_rows: int, prompt_tokens: int, result_tokens: int) -> None:
        """Rows that got their result. Rows refused before the engine bring no tokens."""
        with self._lock:
            self._rows_computed += num_rows
            self._prompt_tokens += prompt_tokens
            self._result_tokens += result_tokens
            self._tokens_in_flight = max(0, self._tokens_in_flight - result_tokens)
            if prompt_tokens or result_tokens:
                self._last_finish_s = self._clock.monotonic()
                self._add_sample(self._last_finish_s)

    def add_durable(
        self, num_rows: int, num_failed: int, counts: Mapping[str, int] | None = None
    ) -> None:
        """`counts`: what the task counts in them, by name."""
        with self._lock:
            self._counts.update(counts or {})
            self._rows_durable += num_rows
            self._rows_failed += num_failed

    def sums(self) -> Sums:
        """What was done here, for the process that adds it up."""
        with self._lock:
            return Sums(
                phase=self._phase,
                rows_computed=self._rows_computed,
                rows_durable=self._rows_durable,
                rows_failed=self._rows_failed,
                counts=dict(self._counts),
                prompt_tokens=self._prompt_tokens,
                result_tokens=self._result_tokens,
                num_in_flight=self._num_in_flight,
                tokens_in_flight=self._tokens_in_flight,
                tokens_per_s=self._recent_tokens_per_s(self._clock.monotonic()),
                num_steps=self._num_steps,
                num_running=self._num_running,
                num_steps_with_more=self._num_steps_with_more,
                num_steps_underfilled=self._num_steps_underfilled,
                stalled_s=self._stalled_s,
            )

    def add_replica(self, label: str, num_restarts: int = 0) -> None:
        """A replica starts, from nothing. What an earlier one of that label has computed and not
        made durable is lost, and computed again.
        """
        with self._lock:
            before, _ = self._replicas.get(label, (Sums(), 0))
            self._rows_computed -= max(0, before.rows_computed - before.rows_durable)
            self._replicas[label] = (Sums(), num_restarts)
            self._sum_in_flight()

    def set_sums(self, label: str, now: Sums) -> None:
        """How far the replica has come by now."""
        with self._lock:
            before, num_restarts = self._replicas[label]
            self._replicas[label] = (now, num_restarts)
            self._rows_computed += now.rows_computed - before.rows_computed
            self._rows_durable += now.rows_durable - before.rows_durable
            self._rows_failed += now.rows_failed - before.rows_failed
            self._counts.update(now.counts)
            self._counts.subtract(before.counts)
            self._prompt_tokens += now.prompt_tokens - before.prompt_tokens
            self._result_tokens += now.result_tokens - before.result_tokens
            self._num_steps += now.num_steps - before.num_steps
            self._num_running += now.num_running - before.num_running
            self._num_steps_with_more += now.num_steps_with_more - before.num_steps_with_more
            self._num_steps_underfilled += now.num_steps_underfilled - before.num_steps_underfilled
            self._stalled_s += (now.stalled_s - before.stalled_s) / len(self._replicas)
            self._sum_in_flight()
            now_s = self._clock.monotonic()
            if self._first_admission_s is None and self._num_in_flight:
                self._first_admission_s = now_s
                self._samples.append((now_s, 0))
            if self._first_admission_s is not None:
                self._add_sample(now_s)
            if now.result_tokens > before.result_tokens or now.prompt_tokens > before.prompt_tokens:
                self._last_finish_s = now_s

    def _sum_in_flight(self) -> None:
        replicas = [sums for sums, _ in self._replicas.values()]
        self._num_in_flight = sum(sums.num_in_flight for sums in replicas)
        self._tokens_in_flight = sum(sums.tokens_in_flight for sums in replicas)

    @property
    def phase(self) -> str:
        return self._phase

    @property
    def rows_computed(self) -> int:
        return self._rows_computed

    @property
    def rows_durable(self) -> int:
        return self._rows_durable

    def add_shard_finished(self) -> None:
        with self._lock:
            self._shards_finished += 1

    def snapshot(self) -> Snapshot:
        with self._lock:
            now_s = self._clock.monotonic()
            tokens_per_s = self._recent_tokens_per_s(now_s)
            generation_s = self._generation_s()
            mean = self._result_tokens / generation_s if generation_s > 0 else 0.0
            rows_total = self._rows_total()
            return Snapshot(
                phase=self._phase,
                rows_total=rows_total,
                rows_done_at_start=self._rows_done_at_start,
                rows_computed=self._rows_computed,
                rows_durable=self._rows_durable,
                rows_failed=self._rows_failed,
                counts=dict(self._counts),
                shards_total=self._shards_total,
                shards_finished=self._shards_finished,
                prompt_tokens=self._prompt_tokens,
                result_tokens=self._result_tokens,
                num_in_flight=self._num_in_flight,
                tokens_in_flight=self._tokens_in_flight,
                elapsed_s=now_s - self._started_s,
                generation_s=generation_s,
                tokens_per_s=tokens_per_s,
                mean_tokens_per_s=mean,
                num_steps=self._num_steps,
                mean_num_running=self._num_running / max(1, self._num_steps),
                share_of_steps_underfilled=(
                    self._num_steps_underfilled / max(1, self._num_steps_with_more)
                ),
                stalled_s=self._stalled_s,
                eta_s=self._eta_s(rows_total, tokens_per_s or mean),
                replicas=[
                    line_of(label, sums, num_restarts)
                    for label, (sums, num_restarts) in self._replicas.items()
                ],
            )

    def _generation_s(self) -> float:
        if self._first_admission_s is None:
            return 0.0
        return max(0.0, self._last_finish_s - self._first_admission_s)

    def _add_sample(self, now_s: float) -> None:
        # The last sample moves until it is _SAMPLE_S past its neighbour: a step is milliseconds,
        # and a window of steps would be thousands of samples.
        if len(self._samples) > 1 and now_s - self._samples[-2][0] < _SAMPLE_S:
            self._samples.pop()
        self._samples.append((now_s, self._tokens()))
        self._forget_older(now_s)

    def _forget_older(self, now_s: float) -> None:
        while len(self._samples) > 1 and self._samples[1][0] <= now_s - WINDOW_S:
            self._samples.popleft()

    def _recent_tokens_per_s(self, now_s: float) -> float:
        self._forget_older(now_s)
        if not self._samples:
            return 0.0
        since_s, tokens = self._samples[0]
        return max(0, self._tokens() - tokens) / max(now_s - since_s, _SAMPLE_S)

    def _tokens(self) -> int:
        return self._result_tokens + self._tokens_in_flight

    def _rows_total(self) -> int | None:
        """Rows past the filter: known for what is read, extrapolated for the rest."""
        if self._rows_input is None:
            return None
        kept = self._rows_expected / self._rows_read if self._rows_read else 1.0
        return self._rows_expected + round(max(0, self._rows_input - self._rows_read) * kept)

    def _eta_s(self, rows_total: int | None, tokens_per_s: float) -> float | None:
        """Tokens of the rows that are left / rate; long rows come first."""
        tokens_per_row = self._tokens_per_row()
        if rows_total is None or tokens_per_s <= 0 or tokens_per_row is None:
            return None
        remaining = max(0, rows_total - self._rows_done_at_start - self._rows_computed)
        return max(0.0, remaining * tokens_per_row - self._tokens_in_flight) / tokens_per_s

    def _tokens_per_row(self) -> float | None:
        """Mean tokens of a row, None while nothing is known of it.

        What the first rows that finish have is far too short, as short ones finish first. So all
        tokens, those of unfinished rows too, are taken for each row that did finish: right where
        a row ends with the same chance at each token. Nothing finished by half of max_tokens: most
        rows go on to the end.
        """
        most = self._max_tokens or math.inf
        if self._rows_computed >= min(_ETA_ROWS, max(1, self._num_in_flight)):
            return min(most, self._tokens() / self._rows_computed)
        if self._num_in_flight and self._tokens_in_flight >= self._num_in_flight * most / 2:
            return most
        return None
