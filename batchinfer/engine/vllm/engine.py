"""vLLM as an Engine: its `LLMEngine`, driven a step at a time in our process.

Must not know: files, checkpoints, what a key means, what a request asks for (`demands/`). What
vLLM refuses for one request is that row's error; what it would refuse for every request is found
when the engine is built, and is the job's error.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
from typing import Any

from batchinfer.engine.base import Answer, Demand, Request
from batchinfer.engine.demands.completion import CompletionRequest
from batchinfer.engine.host import oom_kills
from batchinfer.engine.vllm.blame import look_at_devices
from batchinfer.engine.vllm.counting import ComputedTokens
from batchinfer.engine.vllm.errors import (
    construction_error,
    first_line,
    rejections,
    step_error,
    whole_reason,
)
from batchinfer.engine.vllm.facts import facts_of, with_loaded
from batchinfer.engine.vllm.fit import device_memory
from batchinfer.engine.vllm.layers import check_moved, quantized_layers
from batchinfer.engine.vllm.measure import measure_device
from batchinfer.engine.vllm.requests import Requests, requests_of
from batchinfer.engine.vllm.settings import VllmSettings
from batchinfer.engine.vllm.setup import (
    check_library,
    engine_arguments,
    prepare_platform,
    usable_platform,
)
from batchinfer.engine.vllm.watch import WarmUpTime, watch_core_process
from batchinfer.errors import ConfigError, EngineDied, RowError
from batchinfer.imports import import_failure

log = logging.getLogger(__name__)

#: Engines in this process, closed. vLLM collects garbage three times over when it shuts down, for
#: 1.3 s; the kernel takes the memory back when the process ends, and mostly that is next.
_closed: list[Any] = []


def import_engine() -> None:
    """Import what building an engine imports. Any thread may, after `prepare_environment`.

    Raises ConfigError.
    """
    usable_platform()
    try:
        from vllm.engine.arg_utils import EngineArgs  # noqa: F401
        from vllm.v1.engine.llm_engine import LLMEngine  # noqa: F401
    except Exception as error:  # a package below it may raise anything while it is imported
        raise import_failure("vLLM", error) from error


def ready_arguments(settings: VllmSettings) -> dict[str, Any]:
    """What vLLM's engine is built with, once this process is as it has to be for that.

    Raises ConfigError, MemoryHeld.
    """
    prepare_platform(settings)
    import_engine()
    check_library()
    arguments = engine_arguments(settings)
    log.debug("engine arguments: %s", arguments)
    look_at_devices(settings, (arguments["max_num_seqs"], arguments["max_num_batched_tokens"]))
    return arguments


def build_vllm_engine(settings: VllmSettings) -> VllmEngine:
    """Load the model and check on it what every request asks.

    Raises ConfigError for what another start cannot fix, TransientError for what it may (a driver
    or a worker process lost, memory that others hold). Call it in a thread that outlives the engine
    (see `plugin`).
    """
    _free_closed()
    arguments = ready_arguments(settings)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    requests = begun(settings.demand, settings)
    log.debug("parameters of every request: %s", requests.shared)
    memory = device_memory(settings.num_devices, is_cpu=bool(usable_platform().is_cpu()))
    others = multiprocessing.active_children()
    try:
        with WarmUpTime() as warm_up:
            core = LLMEngine.from_engine_args(EngineArgs(**arguments))
    except Exception as error:
        raise construction_error(error, arguments, settings, memory) from error
    core.logger_manager = None  # per-request stats stay; the loggers aggregate what nobody reads
    watch_core_process(core, [p for p in multiprocessing.active_children() if p not in others])
    engine = VllmEngine(core, requests, settings)
    try:
        layers = quantized_layers(core, settings)
        engine.facts = with_loaded(engine.facts, settings, layers, warm_up.seconds)
        check_moved(layers, settings.cpu_offload_gib)
        engine.load_adapters()
        engine.check_requests()
    except BaseException:
        engine.close()
        raise
    return engine


class VllmEngine:
    """A loaded vLLM engine. See `Engine` for the contract; one thread calls it."""

    def __init__(self, core: Any, requests: Requests, settings: VllmSettings) -> None:
        self._core = core
        self._requests = requests
        self._settings = settings
        self._oom_kills = oom_kills()
        self._lora_requests = _lora_requests(settings)
        self._num_in_flight = 0
        self._num_running = 0
        self._so_far: dict[int, Answer] = {}  # of streamed requests, by key
        # None: the engine core has a process of its own, and does not report it.
        self._scheduler = getattr(getattr(core.engine_core, "engine_core", None), "scheduler", None)
        self._computed = ComputedTokens(self._scheduler)
        self._rejections = rejections()
        self.facts = facts_of(core, settings)

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def num_tokens_computed(self) -> int:
        return self._computed.num_tokens

    def set_width(self, width: int) -> bool:
        # What vLLM 0.32 has as max_num_active_seqs. In 0.26 the one limit is also what the runner
        # has slots for, and its scheduler asserts it of those that run already.
        scheduler = self._scheduler
        if scheduler is None or not hasattr(scheduler, "max_num_active_reqs"):
            return False
        scheduler.max_num_active_reqs = min(width, self.facts.max_num_seqs)
        return True

    def measure_device(self) -> tuple[float, float] | None:
        return measure_device(self.facts.dtype) if _is_in_process(self._core) else None

    def num_tokens_in_flight(self) -> int:
        states = self._core.output_processor.request_states.values() if self._core else ()
        return sum(state.stats.num_generation_tokens for state in states)

    def add(self, request: Request) -> None:
        params = self._requests.params(request)
        lora = request.lora if isinstance(request, CompletionRequest) else None
        self._add(str(request.key), request.token_ids.tolist(), params, lora)
        self._num_in_flight += 1

    def step(self) -> list[Answer]:
        outputs = self._step()
        answers = [self._requests.answer(o) for o in outputs if o.finished]
        self._so_far = {}
        if len(answers) < len(outputs):  # only streamed requests have outputs before they finish
            unfinished = [self._requests.answer(o) for o in outputs if not o.finished]
            self._so_far = {answer.key: answer for answer in unfinished}
        if self._scheduler is not None:  # what is finished no longer runs
            self._num_running = self._scheduler.get_request_counts()[0] + len(answers)
        else:
            self._num_running = min(self._num_in_flight, self.facts.max_num_seqs)
        self._num_in_flight -= len(answers)
        return answers

    def so_far(self, key: int) -> Answer | None:
        return self._so_far.get(key)

    def abort(self, key: int) -> None:
        self._core.abort_request([str(key)])
        self._num_in_flight -= 1

    def set_demand(self, demand: Demand) -> None:
        before, self._requests = self._requests, begun(demand, self._settings)
        try:
            self.check_requests()
        except ConfigError:
            self._requests = before
            raise

    def close(self) -> None:
        core, self._core = self._core, None
        self._scheduler = None
        self._num_in_flight = 0
        if core is None:
            return
        try:
            if _is_in_process(core):
                _leave_distributed()
                _closed.append(core)
            else:
                core.engine_core.shutdown()
        except Exception:
            log.warning("vLLM did not shut down cleanly", exc_info=True)

    def load_adapters(self) -> None:
        """Load the job's adapters, if it has any. ConfigError if vLLM refuses one.

        It would otherwise be loaded within the first step, where a refusal ends the engine.
        """
        for adapter in self._lora_requests.values():
            try:
                self._core.add_lora(adapter)
            except Exception as error:
                raise ConfigError(
                    f"vLLM cannot run the adapter {adapter.lora_path} ({adapter.lora_name}): "
                    f"{first_line(error)}"
                ) from error

    def check_requests(self) -> None:
        """Send one request as every row will be sent; ConfigError if vLLM refuses it.

        A grammar is compiled after its request was accepted, so that request has to run.
        """
        try:
            self._add("check", [0], self._requests.trial())
        except RowError as error:
            reason = whole_reason(error.__cause__ or error)
            raise ConfigError(f"vLLM refuses {self._requests.settings}: {reason}") from error
        if not self._requests.has_to_run:
            self._core.abort_request(["check"])
            return
        finished: list[Any] = []
        while not finished:
            finished = [output for output in self._step() if output.finished]
        self._requests.check_trial(finished[0])

    def _add(
        self, request_id: str, token_ids: list[int], params: Any, lora: str | None = None
    ) -> None:
        if self._core is None:
            raise EngineDied("the vLLM engine is closed")
        try:
            self._core.add_request(
                request_id,
                {"prompt_token_ids": token_ids},
                params,
                lora_request=self._lora_requests.get(lora),
            )
        except self._rejections as error:
            self._core.abort_request([request_id])  # in case it was refused half-way
            raise RowError("engine_rejected", first_line(error)) from error
        except Exception as error:
            raise self._failed(error) from error

    def _step(self) -> list[Any]:
        if self._core is None:
            raise EngineDied("the vLLM engine is closed")
        try:
            return list(self._core.step())
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> EngineDied | ConfigError:
        # No model_executor here: the engine core has a process of its own, and names its cause.
        executor = getattr(self._core, "model_executor", None)
        return step_error(
            error,
            self._settings,
            (self.facts.max_num_seqs, self.facts.max_num_batched_tokens),
            is_worker_dead=getattr(executor, "is_failed", False),
            is_killed=oom_kills() > self._oom_kills,
        )


def begun(demand: Demand, settings: VllmSettings) -> Requests:
    """What is asked and answered for a demand. Raises ConfigError."""

    def tokenizer() -> Any:
        from vllm.tokenizers import get_tokenizer

        return get_tokenizer(settings.tokenizer_path, trust_remote_code=settings.trust_remote_code)

    requests = requests_of(demand)
    requests.begin(settings.options, tokenizer)
    return requests


def _lora_requests(settings: VllmSettings) -> dict[str | None, Any]:
    """By the name that a request gives, None for those that give none."""
    if not settings.loras:
        return {}
    from vllm.lora.request import LoRARequest

    found: dict[str | None, Any] = {}
    if settings.lora is not None:
        found[None] = LoRARequest("model.lora", 1, settings.lora.path)
    for number, (name, lora) in enumerate(settings.adapters.items(), start=2):
        found[name] = LoRARequest(f"model.adapters.{name}", number, lora.path)
    return found


def _is_in_process(core: Any) -> bool:
    """Whether engine core and worker are in this process, and no other is."""
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    return isinstance(getattr(core, "model_executor", None), UniProcExecutor)


def _leave_distributed() -> None:
    """Let go of what would outlast the process: a file in the temporary folder."""
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def _free_closed() -> None:
    """End the engines that were closed in this process, so that another can be built."""
    if _closed:
        while _closed:
            _closed.pop().engine_core.shutdown()
        gc.unfreeze()
        gc.collect()  # vLLM's object graph is cyclic, and it holds the device's memory
