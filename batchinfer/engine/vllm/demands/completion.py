"""Completions of vLLM.

Requests share one set of sampling parameters, or those of the rows that are sampled alike; only the
seed and a token that is set beforehand differ. Must not know: how an engine is built or driven.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from batchinfer.config import CONSTRAINTS, SamplingSettings
from batchinfer.engine.base import Request
from batchinfer.engine.demands.completion import Completion, CompletionDemand, CompletionRequest
from batchinfer.engine.regexes import unreadable
from batchinfer.engine.vllm.errors import rejections, whole_reason
from batchinfer.engine.vllm.output import completion_of, partial_of
from batchinfer.engine.vllm.reasoning import Splitter, reasoning_problems
from batchinfer.errors import ConfigError, RowError
from batchinfer.model import Lora

_STRUCTURED_FIELDS = {
    "json_schema": "json",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}
#: Those of vLLM's backends that read no more regular expressions than each other.
_GRAMMAR_COMPILERS = ("auto", "xgrammar", "guidance")
#: That of rows with constraints of their own: the one that vLLM tries first.
_OF_ROWS = "xgrammar"
#: Ways of sampling whose parameters are kept.
_MAX_OWN = 1024
_SPECULATIVE = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
#: Of `override_generation_config`: the job's own sampling stands above a model's.
_SAMPLING_KEYS = frozenset(
    {"max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
)


class CompletionRequests:
    """See `Requests`."""

    settings = "the sampling settings"
    #: How many of the likeliest tokens at each position of a prompt come with its logprobs.
    num_prompt_tops = 0

    def __init__(self, demand: CompletionDemand) -> None:
        self.demand = demand
        self._sampling = demand.sampling
        self._has_text = demand.sampling.may_have("stop")
        self._own: dict[int, tuple[SamplingSettings, Any]] = {}  # by what is held here
        self._splitter: Splitter | None = None
        self._compiles = True

    def problems(self, options: Mapping[str, Any]) -> Iterator[str]:
        sampling = self._sampling
        yield from reasoning_problems(sampling, options)
        if options.get("skip_tokenizer_init") and not (
            sampling.ignore_eos
            and not any(map(sampling.may_have, ("structured", "stop")))
            and not sampling.per_row.sets("ignore_eos")
        ):
            yield (
                "engine.options.skip_tokenizer_init leaves vLLM without the end-of-text token, and "
                "without stop texts and structured completions: it needs sampling.ignore_eos, and "
                "no sampling.stop or sampling.structured"
            )
        if is_speculative(options) and sampling.may_have("min_p"):
            yield (
                "sampling.min_p and speculative decoding (engine.options) do not go together: vLLM "
                "does not compute it there. Remove one of them"
            )
        if _backend(options) in _GRAMMAR_COMPILERS and (why := unreadable(sampling.structured)):
            yield why
        yield from self.prompt_problems(options)
        if key := overridden_sampling(options):
            yield (
                f"engine.options.override_generation_config.{key} has no effect: set sampling.{key}"
            )

    def prompt_problems(self, options: Mapping[str, Any]) -> Iterator[str]:
        """Those of the logprobs of prompts."""
        if options.get("kv_sharing_fast_prefill") and self._sampling.prompt_logprobs:
            yield (
                f"{self.demand.prompt_logprobs_key} and engine.options.kv_sharing_fast_prefill do "
                "not go together: vLLM's would be wrong. Remove one of them"
            )

    def arguments(self, loras: Sequence[Lora]) -> Mapping[str, Any]:
        """Where the output layer has an adapter, vLLM cannot compute prompt logprobs."""
        lora = next((lora for lora in loras if "lm_head" in lora.modules), None)
        if self._sampling.prompt_logprobs and lora is not None:
            raise ConfigError(
                f"vLLM cannot compute {self.demand.prompt_logprobs_key} with an adapter of "
                f"lm_head, such as {lora.path} (model.lora): remove one of them"
            )
        arguments: dict[str, Any] = {"max_logprobs": max(20, self._sampling.logprobs or 0)}
        if self._sampling.reasoning_parser is not None:
            # A structured answer begins after the thought then, and a thought can be ended.
            arguments["reasoning_parser"] = self._sampling.reasoning_parser
        if any(map(self._sampling.per_row.sets, CONSTRAINTS)):
            # An engine has one. Left to vLLM, that is what the first row needs, whatever others do.
            arguments["structured_outputs_config"] = {"backend": _OF_ROWS}
        return arguments

    def begin(self, options: Mapping[str, Any], tokenizer: Callable[[], Any]) -> None:
        self._compiles = _backend(options) in _GRAMMAR_COMPILERS
        if self._sampling.reasoning_parser is not None:
            self._splitter = Splitter(self.demand, options, tokenizer())

    @property
    def uses_seeds(self) -> bool:
        return self._sampling.uses_seeds

    @cached_property
    def shared(self) -> Any:
        return self._params(self._sampling)

    def _params(self, sampling: SamplingSettings) -> Any:
        params = shared_params(
            sampling, num_prompt_tops=self.num_prompt_tops, has_text=self._has_text
        )
        if self._splitter is not None:
            params.skip_special_tokens = self._splitter.skips_special_tokens
        return params

    def _of(self, own: SamplingSettings | None) -> Any:
        """What requests that are sampled so have in common. Raises RowError."""
        if own is None:
            return self.shared
        if id(own) not in self._own:
            if len(self._own) >= _MAX_OWN:
                self._own = {}
            if self._compiles and (why := unreadable(own.structured)):
                raise RowError("engine_rejected", why)
            try:
                params = self._params(own)
            except ConfigError as error:
                raise RowError("engine_rejected", str(error)) from None
            self._own[id(own)] = (own, params)
        return self._own[id(own)][1]

    def params(self, request: Request) -> Any:
        assert isinstance(request, CompletionRequest)
        assert request.seed is None or self._sampling.uses_seeds, "the engine has no seeds"
        params = copy.copy(self._of(request.sampling))
        params.seed = request.seed
        if request.next_token is not None:
            # Its logprob is that of the raw logits: vLLM takes those before it masks any token.
            params.allowed_token_ids = [request.next_token]
        if request.is_streamed:
            from vllm.sampling_params import RequestOutputKind

            params.output_kind = RequestOutputKind.CUMULATIVE
        return params

    def answer(self, output: Any) -> Completion:
        if not output.finished:
            return partial_of(output, has_text=self._has_text)
        completion = completion_of(output, has_text=self._has_text)
        if self._splitter is not None and completion.error_type is None:
            self._splitter.split(completion, output.prompt_token_ids)
        return completion

    def trial(self) -> Any:
        params = copy.copy(self.shared)
        params.max_tokens = 1
        return params

    @property
    def has_to_run(self) -> bool:
        return self._sampling.structured is not None

    def check_trial(self, output: Any) -> None:
        assert self._sampling.structured is not None
        if output.outputs[0].finish_reason not in ("stop", "length"):
            kind, value = self._sampling.structured.constraint
            raise ConfigError(
                f"vLLM cannot compile sampling.structured.{kind}: {str(value)[:200]}. It may match "
                "nothing, or need what the grammar compiler lacks; a backend may be chosen by "
                "engine.options.structured_outputs_config.backend"
            )


def _backend(options: Mapping[str, Any]) -> Any:
    """Which one turns a constraint into a mask of tokens."""
    given = options.get("structured_outputs_config")
    return given.get("backend", "auto") if isinstance(given, Mapping) else "auto"


def is_speculative(options: Mapping[str, Any]) -> bool:
    """Whether another model or method guesses tokens ahead."""
    return any(options.get(name) for name in _SPECULATIVE)


def overridden_sampling(options: Mapping[str, Any]) -> str | None:
    """A setting of `override_generation_config` above which the job's own stands."""
    overridden = options.get("override_generation_config")
    if not isinstance(overridden, Mapping):
        return None
    return min(_SAMPLING_KEYS & overridden.keys(), default=None)


def shared_params(
    sampling: SamplingSettings, *, num_prompt_tops: int = 0, has_text: bool = False
) -> Any:
    """The parameters that requests share. ConfigError for a value that vLLM does not accept.

    `num_prompt_tops`: the likeliest tokens that come with `sampling.prompt_logprobs`. `has_text`:
    vLLM detokenizes, as it has to for stop texts.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    try:
        structured = None
        if sampling.structured is not None:
            kind, value = sampling.structured.constraint
            structured = StructuredOutputsParams(**{_STRUCTURED_FIELDS[kind]: value})
        budget = {}
        if sampling.thinking_budget_tokens is not None:
            budget["thinking_token_budget"] = sampling.thinking_budget_tokens
        return SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            stop=list(sampling.stop),
            stop_token_ids=list(sampling.stop_token_ids),
            logprobs=sampling.logprobs,
            prompt_logprobs=num_prompt_tops if sampling.prompt_logprobs else None,
            flat_logprobs=True,
            ignore_eos=sampling.ignore_eos,
            structured_outputs=structured,
            detokenize=has_text,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # 0.6 us a request for a shallow copy, 20 us for a deep one
            **budget,
        )
    except rejections() as error:
        raise ConfigError(f"vLLM refuses the sampling settings: {whole_reason(error)}") from error


REQUESTS = CompletionRequests
