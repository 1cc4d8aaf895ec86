"""Some rows of a job really run, to learn what its forecast needs: lengths and the time of steps.

They go through the engine of a run and its loop; nothing is written. Two waves, one far narrower
than the other: with one width alone, what a step costs could not be separated from what a sequence
in it costs. Must not know: files, click.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchinfer.config import Job
from batchinfer.engine.base import Answer, Engine, EngineFacts, Request
from batchinfer.engine.demands.completion import Completion, CompletionDemand
from batchinfer.engine.kinds import engine_kind
from batchinfer.errors import ConfigError, InputError, Stopped
from batchinfer.forecast.forecast import Lengths, Wave
from batchinfer.model import ModelFacts
from batchinfer.plan import Chunk, OwnWay
from batchinfer.runner.factory import build_engine, engine_spec
from batchinfer.runner.loop import Loop
from batchinfer.runner.ready import ReadyWork
from batchinfer.runner.stop import Stop
from batchinfer.runner.tuning import Tuning
from batchinfer.tasks import Task, task_of
from batchinfer.telemetry import Clock, Counters

#: Below it two waves hold too few steps and lengths to say anything about their spread.
MIN_ROWS = 16
#: Share of the measured rows that run in the first, narrow wave.
_FIRST_SHARE = 1 / 8


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured."""

    facts: EngineFacts
    waves: list[Wave]
    load_s: float  # to import the engine
    build_s: float  # to load the model
    close_s: float  # to end the engine

    @property
    def generation_s(self) -> float:
        return float(sum(wave.step_s.sum() for wave in self.waves))

    @property
    def max_running(self) -> int:
        """Most sequences that ran at once."""
        widest = max(len(wave.lengths.prompt) for wave in self.waves)
        return min(widest, self.facts.max_num_seqs)


def check_measurable(task: Task) -> None:
    """Raise ConfigError for a task whose results have no length that could be measured."""
    if task.demand.wants != CompletionDemand.wants:
        raise ConfigError(
            f"plan --measure forecasts how long completions become, and task: {task.name} "
            f"generates none: run some rows with --limit, which count, and read "
            f"{task.counts[0]}_per_s in the last line"
        )


def measure(
    job: Job,
    model: ModelFacts,
    prompts: Sequence[npt.NDArray[np.int32]],
    stop: Stop,
    tuning: Tuning,
    own: Sequence[OwnWay] | None = None,
) -> Measurement:
    """Run `prompts` as the job would, each as its row's `own` says. The kind's `prepare` was called
    before.

    Raises ConfigError, InputError, EngineDied, Stopped.
    """
    begun_s = time.monotonic()
    tuning.importing()  # here and below as a run does it, so that it takes as long
    kind = engine_kind(job.engine.name)
    kind.load()
    loaded_s = time.monotonic()
    tuning.imported()
    engine = build_engine(kind, engine_spec(job, model))
    ready_s = time.monotonic()
    try:
        num_first = max(1, round(len(prompts) * _FIRST_SHARE)) if len(prompts) > 1 else 0
        waves = [
            _run_wave(job, engine, prompts[part], stop, own and own[part])
            for part in (slice(num_first), slice(num_first, None))
            if len(prompts[part])
        ]
        if not all(len(wave.step_s) for wave in waves):
            raise InputError("the engine refuses every row of the measurement")
    finally:
        generated_s = time.monotonic()
        tuning.imported()
        engine.close()
    return Measurement(
        facts=engine.facts,
        waves=waves,
        load_s=loaded_s - begun_s,
        build_s=ready_s - loaded_s,
        close_s=time.monotonic() - generated_s,
    )


def _run_wave(
    job: Job,
    engine: Engine,
    prompts: Sequence[npt.NDArray[np.int32]],
    stop: Stop,
    own: Sequence[OwnWay] | None,
) -> Wave:
    ready = ReadyWork(order=job.packing.order, max_tokens=job.packing.buffer_tokens)
    ready.put(Chunk.of_prompts(prompts, num_samples=task_of(job).num_samples, own=own))
    ready.close()
    recorder = _Recorder(engine)
    loop = Loop(
        recorder,
        ready,
        lambda results: None,
        Counters(Clock()),
        job=job,
        should_stop=lambda: stop.is_requested,
    )
    if stop.begin_admission():
        loop.run()
    if stop.is_requested:
        raise Stopped(f"{stop.reason}: the measurement was abandoned", stop.code)
    return recorder.wave()


class _Recorder:
    """An engine that notes the completions that it gives, and when each step ended."""

    def __init__(self, engine: Engine) -> None:
        self.facts = engine.facts
        self._engine = engine
        self._num_prompt_tokens: dict[int, int] = {}  # by key, in order of admission
        self._completions: dict[int, Completion] = {}
        self._ended_s = [time.monotonic()]

    def add(self, request: Request) -> None:
        self._engine.add(request)
        self._num_prompt_tokens[request.key] = len(request.token_ids)

    def step(self) -> Sequence[Answer]:
        answers = self._engine.step()
        self._ended_s.append(time.monotonic())
        self._completions |= {answer.key: Completion.of(answer) for answer in answers}
        return answers

    def num_tokens_in_flight(self) -> int:
        return self._engine.num_tokens_in_flight()

    @property
    def num_running(self) -> int:
        return self._engine.num_running

    def close(self) -> None:
        self._engine.close()

    def wave(self) -> Wave:
        completions = [self._completions[key] for key in self._num_prompt_tokens]
        prompt = np.array(list(self._num_prompt_tokens.values()), dtype=np.int64)
        cached = np.array([c.num_cached_tokens for c in completions], dtype=np.int64)
        completion = np.array([len(c.token_ids) for c in completions], dtype=np.int64)
        return Wave(Lengths(prompt, prompt - cached, completion), np.diff(self._ended_s))
