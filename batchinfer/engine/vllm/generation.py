"""What a request asks of vLLM and what comes of it, where tokens are generated or scored.

All requests share one set of sampling parameters; only the seed and a token that is set beforehand
differ. Must not know: how an engine is built or driven.
"""

from __future__ import annotations

import copy
from typing import Any

from batchinfer.config import SamplingSettings
from batchinfer.engine.base import Completion, Request
from batchinfer.engine.vllm.errors import first_line, rejections
from batchinfer.engine.vllm.output import completion_of, partial_of
from batchinfer.errors import ConfigError

_STRUCTURED_FIELDS = {
    "json_schema": "json",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}


class Generation:
    """Requests of one job. Raises ConfigError for a value that vLLM does not accept."""

    def __init__(self, sampling: SamplingSettings, wants: str = "completion") -> None:
        """`wants`: as in `Demand`."""
        self._sampling = sampling
        self._params = shared_params(sampling, wants)
        self._has_text = bool(sampling.stop)

    @property
    def shared(self) -> Any:
        """What all requests have in common."""
        return self._params

    def params(self, request: Request) -> Any:
        """What vLLM is given beside the token ids."""
        assert request.seed is None or self._sampling.uses_seeds, "the engine has no seeds"
        params = copy.copy(self._params)
        params.seed = request.seed
        if request.next_token is not None:
            # Its logprob is that of the raw logits: vLLM takes those before it masks any token.
            params.allowed_token_ids = [request.next_token]
        if request.is_streamed:
            from vllm.sampling_params import RequestOutputKind

            params.output_kind = RequestOutputKind.CUMULATIVE
        return params

    def completion(self, output: Any) -> Completion:
        """What came of a request; `output` is vLLM's, finished."""
        return completion_of(output, has_text=self._has_text)

    def so_far(self, output: Any) -> Completion:
        """What a streamed request has; `output` is vLLM's, not finished."""
        return partial_of(output, has_text=self._has_text)

    def trial(self) -> Any:
        """`params` of a short request like all others."""
        params = copy.copy(self._params)
        params.max_tokens = 1
        return params

    @property
    def has_to_run(self) -> bool:
        """Whether vLLM finds out only while a request runs that it cannot serve any."""
        return self._sampling.structured is not None

    def check_trial(self, output: Any) -> None:
        """Raise ConfigError if the trial did not end as a request does."""
        assert self._sampling.structured is not None
        if output.outputs[0].finish_reason not in ("stop", "length"):
            kind, value = self._sampling.structured.constraint
            raise ConfigError(f"vLLM cannot compile sampling.structured.{kind}: {str(value)[:200]}")


def shared_params(sampling: SamplingSettings, wants: str = "completion") -> Any:
    """The parameters all requests share. ConfigError for a value that vLLM does not accept.

    Where prompts' logprobs are what is wanted, `sampling.logprobs` is of their tokens too.
    """
    num_of_prompt = sampling.logprobs or 0 if wants == "prompt_logprobs" else 0
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    try:
        structured = None
        if sampling.structured is not None:
            kind, value = sampling.structured.constraint
            structured = StructuredOutputsParams(**{_STRUCTURED_FIELDS[kind]: value})
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
            prompt_logprobs=num_of_prompt if sampling.prompt_logprobs else None,
            flat_logprobs=True,
            ignore_eos=sampling.ignore_eos,
            structured_outputs=structured,
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # 0.6 us a request for a shallow copy, 20 us for a deep one
        )
    except rejections() as error:
        raise ConfigError(f"vLLM refuses the sampling settings: {first_line(error)}") from error
