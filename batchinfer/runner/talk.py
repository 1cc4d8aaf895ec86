"""A conversation with a job's model: what was said, and the engine that answers.

Must not know: terminals, files. Invariants: a change that is refused leaves everything as it was; a
model is loaded again only where a setting of the running one cannot change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from batchinfer.config import Job
from batchinfer.engine.base import Engine, EngineSpec, ResamplingEngine
from batchinfer.engine.demands.completion import Completion
from batchinfer.engine.kinds import engine_kind
from batchinfer.errors import ConfigError
from batchinfer.prompt import RowPrompter
from batchinfer.runner.factory import engine_spec, model_of
from batchinfer.runner.one_prompt import for_one, opening, row_of, with_conversation
from batchinfer.runner.stream import Stream
from batchinfer.tasks import task_of

Load = Callable[[EngineSpec], Engine]


class Talk:
    """Call `open` first and `close` at the end; one thread."""

    def __init__(self, job: Job, load: Load) -> None:
        """`load` builds an engine, after the kind's `prepare`. Raises ConfigError for a job whose
        task has no completions, or a model that cannot be or does not fit.
        """
        if task_of(job).demand.wants != "completion":
            raise ConfigError(f"task: {job.task} has no answers: chat needs task: generate")
        self._load = load
        self._job = job
        self.system: list[Mapping[str, str]] = opening(job.prompt)
        self.messages: list[Mapping[str, str]] = []  # after those of the system
        self._spec = _checked(job)
        engine_kind(job.engine.name).prepare(self._spec)
        self.prompter = _prompter(self._spec)
        self._engine: Engine | None = None
        self._num_asked = 0
        self.num_context_tokens = 0  # of the last prompt and its answer

    @property
    def engine(self) -> Engine:
        assert self._engine is not None
        return self._engine

    @property
    def spec(self) -> EngineSpec:
        return self._spec

    def open(self) -> None:
        """Load the model. Raises ConfigError, TransientError."""
        self._engine = self._load(self._spec)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def ask(self, text: str, should_stop: Callable[[], bool]) -> Stream:
        """The answer to what the user says next, see `Stream`; `keep` makes both part of the talk.

        Raises InputError if the prompt is too long.
        """
        messages = [*self.system, *self.messages, {"role": "user", "content": text}]
        row = row_of(messages, self._num_asked)
        prepared = row.prepared(self.prompter)
        item = row.work_item(prepared)
        (ask,) = task_of(self._spec.job).work(item, self._spec.model.max_model_len).asks()
        self.num_context_tokens = len(prepared.token_ids)
        self._num_asked += 1
        return Stream(self.engine, ask, self._num_asked, should_stop)

    def keep(self, text: str, completion: Completion, answer: str) -> None:
        self.messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer},
        ]
        self.num_context_tokens += len(completion.token_ids)

    def clear(self) -> None:
        self.messages.clear()
        self.num_context_tokens = 0

    def change(self, job: Job) -> bool:
        """Go on with other settings; whether the model was loaded again for it.

        Raises ConfigError, and TransientError for a lack of memory: then it continues as before.
        """
        before, engine = self._spec, self.engine
        spec = _checked(job)
        prompter = _prompter(spec)
        if not _needs_load(before, spec) and isinstance(engine, ResamplingEngine):
            engine.set_demand(spec.demand)
            self._spec, self.prompter = spec, prompter
            return False
        engine.close()
        try:
            engine_kind(job.engine.name).prepare(spec)
            self._engine = self._load(spec)
        except Exception:
            self._engine = self._load(before)
            raise
        self._spec, self.prompter = spec, prompter
        return True


def _checked(job: Job) -> EngineSpec:
    """What the engine is built from, with conversations as prompts."""
    spec = engine_spec(for_one(with_conversation(job)), model_of(job))
    engine_kind(job.engine.name).check_fit(spec)
    return spec


def _prompter(spec: EngineSpec) -> RowPrompter:
    return task_of(spec.job).prompter(spec.job, spec.model)


def _needs_load(before: EngineSpec, after: EngineSpec) -> bool:
    """How an engine reads prompts may depend on whether requests have seeds or prompts logprobs,
    and where a form begins to bind on how thoughts end.
    """
    old, new = before.job, after.job
    is_same_engine = (old.model, old.engine) == (new.model, new.engine)
    kept = ("uses_seeds", "prompt_logprobs", "reasoning_parser")
    is_same_sampling = all(getattr(old.sampling, n) == getattr(new.sampling, n) for n in kept)
    return not (is_same_engine and is_same_sampling)
