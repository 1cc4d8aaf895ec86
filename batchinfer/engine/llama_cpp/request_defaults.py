"""A job's sampling as what llama.cpp's server takes where a request does not say.

Numbers are the server's own defaults, which hold at every endpoint. What it has no default for is
written into the requests for completions and chats. Must not know: HTTP, the library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from batchinfer.config import SamplingSettings
from batchinfer.engine.llama_cpp.sampling import GUIDANCE, one_of
from batchinfer.errors import ConfigError

#: A request that says one of the keys has said what the first stands for.
SAID_BY: Mapping[str, Sequence[str]] = {
    name: (name, "grammar", "json_schema", "response_format", "tools")
    for name in ("grammar", "json_schema")
}
#: Keys of OpenAI's and vLLM's requests that the server passes over: with these values they ask for
#: nothing.
_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "best_of": (1,),
    "echo": (False,),
    "include_stop_str_in_output": (False,),
    "min_tokens": (0,),
    "prompt_logprobs": (),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
_FORMS = ("json", "regex", "choice", "grammar")
#: Endpoints whose requests have these keys.
CHAT_PATHS = ("/v1/chat/completions", "/chat/completions")
PATHS = (*CHAT_PATHS, "/v1/completions", "/completions", "/completion")


def check_served(sampling: SamplingSettings) -> None:
    """Raise ConfigError for what llama.cpp's server cannot do."""
    if sampling.stop_token_ids:
        raise ConfigError(
            "sampling.stop_token_ids: llama.cpp's server ends completions at texts alone: leave "
            "it out, or give the tokens' texts as sampling.stop"
        )


def server_sampling(sampling: SamplingSettings) -> dict[str, Any]:
    """By llama.cpp's names; in the order in which a run applies them."""
    return {
        "samplers": "penalties;temperature;min_p;top_k;top_p",
        "temp": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": max(0, sampling.top_k),
        "min_p": sampling.min_p,
        "penalty_last_n": -1,  # all of the context
        "penalty_repeat": sampling.repetition_penalty,
        "penalty_freq": sampling.frequency_penalty,
        "penalty_present": sampling.presence_penalty,
    }


def request_values(sampling: SamplingSettings) -> dict[str, Any]:
    """Keys of a request's body."""
    values: dict[str, Any] = {}
    if sampling.stop:
        values["stop"] = list(sampling.stop)
    if sampling.seed is not None:
        values["seed"] = sampling.seed & 0xFFFFFFFF
    if sampling.ignore_eos:
        values["ignore_eos"] = True
    if sampling.structured is not None:
        kind, value = sampling.structured.constraint
        if kind == "json_schema":
            values["json_schema"] = value
        else:
            values["grammar"] = _grammar(kind, value)
    return values


def translated(body: Mapping[str, Any]) -> dict[str, Any]:
    """A request's body with vLLM's keys as llama.cpp's server has them.

    Raises ValueError for a key of OpenAI's or vLLM's that it would pass over.
    """
    for key, nothing in _NOTHING.items():
        value = body.get(key)
        if value is not None and value not in nothing:
            raise ValueError(f"{key}: llama.cpp's server cannot do that: leave it out")
    found = dict(body)
    if (penalty := found.pop("repetition_penalty", None)) is not None:
        found.setdefault("repeat_penalty", penalty)
    if (form := found.pop("structured_outputs", None)) is not None:
        found |= _form(form)
    return found


def _form(form: Any) -> dict[str, Any]:
    pairs = form.items() if isinstance(form, Mapping) else ()
    said = [(key, value) for key, value in pairs if value is not None]
    if len(said) != 1 or said[0][0] not in _FORMS:
        raise ValueError(f"structured_outputs must have one of {', '.join(_FORMS)}")
    ((key, value),) = said
    if key == "json":
        schema = json.loads(value) if isinstance(value, str) else value
        if isinstance(schema, Mapping):
            return {"json_schema": schema}
    elif key == "choice":
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            return {"grammar": _grammar(key, value)}
    elif isinstance(value, str):
        return {"grammar": _grammar(key, value)}
    raise ValueError(f"structured_outputs.{key} is none: {str(value)[:80]}")


def _grammar(kind: str, value: Any) -> str:
    if kind == "choice":
        return one_of(value)
    if kind in GUIDANCE:  # a regular expression, as LLGuidance reads it
        return f"%llguidance {{}}\nstart: {_quoted(str(value))}\n"
    return str(value)


def _quoted(regex: str) -> str:
    """Between slashes, in one line."""
    escaped = regex.replace("\\/", "/").replace("/", "\\/").replace("\n", "\\n")
    return f"/{escaped}/"


def schema_of(body: Mapping[str, Any]) -> str | None:
    """The JSON schema that a request asks for; None: none."""
    schema = body.get("json_schema")
    form = body.get("response_format")
    if schema is None and isinstance(form, Mapping):
        inner = form.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, Mapping) else form.get("schema")
    return json.dumps(schema) if isinstance(schema, Mapping) else None
