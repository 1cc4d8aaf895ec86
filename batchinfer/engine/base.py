"""What an engine is to the rest of the program: requests in, answers out, a step at a time.

Must not know: files, checkpoints, shards, what is asked and answered (`demands/`). A request's
`key` is the caller's and means nothing here.
Token data is flat numpy arrays; no Python object for a token survives a step.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from batchinfer.config import Job
from batchinfer.model import ModelFacts
from batchinfer.quantization import Machine

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Request:
    """What the engine is asked for a row, or for a part of one; a kind of demand may add to it.

    `key` is unique among those in flight.
    """

    key: int
    token_ids: Int32Array  # [num_prompt_tokens]

    def __str__(self) -> str:
        return f"{len(self.token_ids)} tokens"


@dataclass(slots=True)
class Timing:
    """Seconds, from the engine's monotonic clock; None where the engine did not say."""

    queued_s: float | None = None  # added -> first scheduled
    prefill_s: float | None = None  # first scheduled -> first token
    decode_s: float | None = None  # first token -> last token
    total_s: float | None = None  # added -> last token


@dataclass(slots=True, eq=False)
class Answer:
    """What came of one request. Either a result (`error_type` None), which is of a subclass in
    `demands/`, or an error.

    Arrays are not views: whoever holds an answer holds `num_bytes`, not what they were cut from.
    """

    key: int
    timing: Timing = field(default_factory=Timing, kw_only=True)
    error_type: str | None = field(default=None, kw_only=True)  # a key of errors.ROW_ERROR_KINDS
    error_message: str | None = field(default=None, kw_only=True)

    def tokens(self) -> tuple[int, int]:
        """(of its prompt found in a cache, generated)"""
        return 0, 0

    @property
    def num_bytes(self) -> int:
        """Bytes of its arrays, plus one for each character of its texts."""
        num_bytes = 0
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                num_bytes += value.nbytes
            elif isinstance(value, str):
                num_bytes += len(value)
        return num_bytes


@dataclass(frozen=True, slots=True)
class Running:
    """How an engine runs, as far as the program asks. None or empty: it did not say."""

    num_devices: int = 1
    kv_cache_dtype: str = ""
    kernels: tuple[str, ...] = ()  # that linear layers are multiplied by
    is_eager: bool = False  # no step has a CUDA graph
    graph_width: int | None = None  # steps of more sequences have none
    memory_share: float | None = None  # of a GPU's
    warm_up_s: float | None = None  # that profiling, compiling and warming up took


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What really runs, for the log, the footer and `runs/NNNN.json`."""

    name: str  # "vllm"
    version: str
    device: str  # "cpu", "NVIDIA H200"
    dtype: str
    quantization: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_tokens: int | None
    running: Running = field(default_factory=Running)
    extra: dict[str, Any] = field(default_factory=dict)  # of this engine's own, for its records

    def as_dict(self) -> dict[str, Any]:
        """As records have it: what `running` has is in `extra`, in the engine's own words."""
        record = asdict(self)
        del record["running"]
        return record


class Engine(Protocol):
    """A running engine. Not thread-safe: one thread calls it.

    Errors: `add` raises RowError for a request this engine refuses (the engine stays usable);
    `step` raises EngineDied if the engine or one of its processes is gone.
    """

    facts: EngineFacts

    def add(self, request: Request) -> None:
        """Queue a request. Raises RowError if the engine refuses it."""

    def step(self) -> Sequence[Answer]:
        """Run one step and return what finished in it, in any order."""

    def num_tokens_in_flight(self) -> int:
        """Tokens generated so far for the requests in flight. Looks at each: to be asked rarely."""

    @property
    def num_running(self) -> int:
        """Sequences that the last step ran. The others in flight waited for room in the engine."""

    def close(self) -> None:
        """End the engine's processes and free the device. Idempotent; never raises.

        What is held in this very process may stay until it ends, or another engine is built.
        """


@runtime_checkable
class StreamingEngine(Engine, Protocol):
    """An engine that also shows what a request has while it runs, and can give one up.

    For people who watch one request; runs ask for neither.
    """

    def so_far(self, key: int) -> Answer | None:
        """The beginning of the answer to a streamed request in flight; None: nothing yet. Asked
        between steps.
        """

    def abort(self, key: int) -> None:
        """Forget a request in flight: `step` returns nothing of it any more."""


@runtime_checkable
class ResamplingEngine(Engine, Protocol):
    """An engine that can sample otherwise without loading the model again."""

    def set_demand(self, demand: Demand) -> None:
        """Serve this one, of the same kind, from the next request on; none is in flight. Whether
        requests have seeds, and whether prompts have logprobs, stays.

        Raises ConfigError for what the engine refuses, and then continues as before.
        """


@runtime_checkable
class CountingEngine(Engine, Protocol):
    """An engine that knows how many tokens its steps compute, prompts included."""

    @property
    def num_tokens_computed(self) -> int:
        """In all steps so far. 0 forever: this one does not know."""


@runtime_checkable
class MeasurableEngine(Engine, Protocol):
    """An engine that can measure the device that it runs on, between steps."""

    def measure_device(self) -> tuple[float, float] | None:
        """What a product of matrices in the model's dtype reaches in operations a second, and a
        copy in bytes a second, read and written. Takes a second at most, uses what memory is free.
        None: it cannot be measured from here.
        """


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of what `doctor` prints about an engine on this machine."""

    subject: str  # "device"
    text: str
    mark: Literal["ok", "no", "-", "MISSING"] = "ok"
    is_failure: bool = False  # no job can run


@dataclass(frozen=True, slots=True)
class Demand:
    """What a job's task asks of an engine, for every request; subclasses are in `demands/`."""

    wants: ClassVar[str]  # the name of its module there

    task: str  # its name, for messages


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine is built from, as it is: each kind takes what it knows."""

    job: Job  # of which an engine reads the sections `model` and `engine`
    model: ModelFacts
    demand: Demand


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a copy of the engine runs, a replica: what its process has to have before its start.

    One that asks for nothing may run in any process.
    """

    label: str  # for people: "GPU 0"
    environ: Mapping[str, str] = field(default_factory=dict)
    cores: tuple[int, ...] = ()  # that are its own; none: any
    gpus: tuple[int, ...] = ()  # by index among the visible ones; none: whichever the engine takes

    @property
    def is_anywhere(self) -> bool:
        return not self.environ and not self.cores


class EngineKind(Protocol):
    """What the program asks of an engine that does not run yet: may it, will it fit, start it.

    Its module is light to import: only `load` and `build` import the engine's own packages.
    """

    @property
    def wants(self) -> Collection[str]:
        """What it can give a task: values of `Demand.wants`, see `kinds.demands_in`."""

    def machine(self) -> Machine:
        """What the engine would run on here. `device` None: it is not installed, or finds none."""

    def packages(self) -> Iterable[str]:
        """Names of the distributions that it computes with: another version may round otherwise."""

    def check(self, job: Job, demand: Demand) -> None:
        """Raise ConfigError for settings that this engine refuses, before the model is looked at.

        Writes nothing and loads nothing; every command that reads a job asks.
        """

    def deciding_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a job's `engine.options` that decide results: an output keeps them."""

    def needs_weights(self, job: Job) -> bool:
        """Whether the model's weights have to be there; some engines can invent them."""

    def placements(self, job: Job) -> Sequence[Placement]:
        """Where the job's `engine.devices` has a replica each, at least one.

        Raises ConfigError for devices that are not there.
        """

    def num_gpus(self, job: Job) -> int:
        """How many GPUs of a node a replica takes, whatever this machine has; 0: none, it computes
        on a CPU.
        """

    def check_fit(self, spec: EngineSpec) -> None:
        """Raise ConfigError if the model certainly does not fit this machine's devices."""

    def describe_memory(self, spec: EngineSpec) -> list[str]:
        """Lines on what the job needs, then on what there is; none where that is unknown.

        One that begins with "does not fit" says that it does not, and what would.
        """

    def examine(self) -> Iterable[Finding]:
        """What works on this machine. May import the engine. Raises nothing."""

    def prepare(self, spec: EngineSpec) -> None:
        """Set this process up, before anything of the engine is imported.

        Raises ConfigError for what is certain not to run, MemoryHeld if others hold the memory.
        """

    def load(self) -> None:
        """Import what `build` needs, after `prepare`, in any thread. `build` would do it too."""

    def phases(self, report: Callable[[str], None]) -> AbstractContextManager[None]:
        """While it is open, `report` is called with what a `build` in this process is busy with."""

    def build(self, spec: EngineSpec) -> Engine:
        """Load the model, from `spec.model.path`. The calling thread outlives the engine.

        Raises ConfigError for what a retry cannot fix, TransientError for what it may.
        """


@runtime_checkable
class ForeseeingKind(Protocol):
    """What an `EngineKind` has besides if it knows how an engine would run before there is one."""

    def expected_facts(self, spec: EngineSpec) -> EngineFacts | None:
        """What an engine that is built now would say of itself, as far as estimates go. None:
        there is no device for one. Loads nothing.
        """


@dataclass(frozen=True, slots=True)
class Serving:
    """How a server is reached and what it keeps to, beside what the job says."""

    socket: socket.socket  # bound to its address, does not listen yet
    model_name: str  # by which clients ask for the job's model, with its adapter
    api_key: str | None = field(repr=False)  # whoever asks for more than /health has to give it
    chat_template: str | None  # its text; None: the tokenizer's own
    drain_s: float  # requests in flight have this long after SIGTERM
    folder: str  # of files that are for this server alone
    logs_requests: bool = False


@runtime_checkable
class ServingKind(Protocol):
    """What an `EngineKind` has besides if its engine can be a server."""

    def serve(self, spec: EngineSpec, serving: Serving) -> int:
        """Load the model and answer what OpenAI's clients ask, until SIGTERM; then let the requests
        in flight end. Called by the main thread of a process that is for nothing else, after
        `prepare`.

        GET /health answers 200 once requests are answered, without the key. What a request does not
        say is as in the job's `sampling`; `spec.demand` has seeds, as any request may bring one.
        The number of requests that were cut off at the end. Raises ConfigError, TransientError, and
        EngineDied for an end that nobody asked for.
        """
