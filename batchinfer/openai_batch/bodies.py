"""What a request's body asks for: a prompt, and how its answer is sampled.

Must not know: tokens, files. Invariant: a key is honoured, has no bearing on an answer, or makes
its line an error; none is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from batchinfer.config import CONSTRAINTS, SamplingSettings
from batchinfer.config.problems import translate
from batchinfer.config.values import shown
from batchinfer.openai_batch.keys import (
    CHAT,
    COMPLETIONS,
    PLAIN,
    WITHOUT_BEARING,
    refuse_key,
    unsupported,
    with_whole_numbers,
)
from batchinfer.openai_batch.lines import Line, LineError, no_data_of_a_line

#: OpenAI's, where a request for a completion does not say it.
COMPLETION_TOKENS = 16
MAX_CHOICES = 128

#: OpenAI's and vLLM's words for how much is thought.
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_STRUCTURED = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}


@dataclass(frozen=True, slots=True)
class Asked:
    """`prompts`: texts or token ids, each of which gets `num_choices` answers; a conversation is
    one, as JSON. `own`: setting of `sampling` -> the line's value. `key_kwargs`: arguments of
    the chat template that have keys of their own; `needs_read`: such a key -> arguments of which
    the template has to read one, or the key were passed over.
    """

    prompts: list[str | list[int]]
    is_chat: bool
    model: str | None
    own: dict[str, Any]
    num_choices: int = 1
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    key_kwargs: Mapping[str, Any] = field(default_factory=dict)
    needs_read: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    continues: bool = False
    returns_token_ids: bool = False


def asked_of(
    line: Line,
    sampling: SamplingSettings,
    models: Collection[str],
    adapters: Collection[str] = (),
) -> Asked:
    """`sampling`: what holds where a line does not say it; `models`: names of the model, and
    `adapters` of it with one of its adapters. Raises LineError.
    """
    if line.url not in (CHAT, COMPLETIONS):
        raise LineError(
            f"{line.url} is not answered here: {CHAT} and {COMPLETIONS} are", "invalid_url", "url"
        )
    given = {key: value for key, value in line.body.items() if value is not None}
    body = with_whole_numbers(given)
    for key, value in body.items():
        if key not in WITHOUT_BEARING and (wrong := no_data_of_a_line(value)) is not None:
            code = "invalid_prompt" if key in ("messages", "prompt") else "invalid_value"
            raise LineError(f"{key} {wrong}", code, key)
    model = _typed(body, "model", str, "text")
    if model is not None and model not in models and model not in adapters:
        known = ", ".join(sorted({*models, *adapters}))
        raise LineError(
            f"the model {model!r} does not exist: this run has {known} (--served-model-name)",
            "model_not_found",
            "model",
            404,
        )
    take = _chat if line.url == CHAT else _completion
    asked = take(body, model)
    if asked.num_choices * len(asked.prompts) > MAX_CHOICES:
        raise LineError(f"n: at most {MAX_CHOICES} choices of a line", "invalid_value", "n")
    for key, value in body.items():
        refuse_key(line.url, key, value)
    check_sampling(sampling, asked.own)
    if model in adapters:
        asked.own["lora"] = model
    return asked


def check_sampling(sampling: SamplingSettings, own: Mapping[str, Any]) -> None:
    """Raise LineError for values that no row may have."""
    values = {name: value for name, value in own.items() if name != "json_schema"}
    if "json_schema" in own:
        values["json_schema"] = json.loads(own["json_schema"])
    try:
        sampling.of_row(values)
    except ValidationError as error:
        key, problem = next(translate(error, SamplingSettings))
        key = key.removeprefix("structured.").partition(".")[0]
        raise LineError(f"{key}: {problem}", "invalid_value", key) from None


def _chat(body: dict[str, Any], model: str | None) -> Asked:
    body.pop("model", None)
    if "messages" not in body:
        raise LineError("messages is missing", "missing_required_parameter", "messages")
    messages = json.dumps(body.pop("messages"), ensure_ascii=False)
    most = body.pop("max_tokens", None)
    own = _own(body, body.pop("max_completion_tokens", most))
    if _typed(body, "logprobs", bool, "true or false"):
        own["logprobs"] = body.pop("top_logprobs", 0)
    elif body.pop("top_logprobs", 0):
        raise LineError("top_logprobs needs logprobs: true", "invalid_value", "top_logprobs")
    body.pop("logprobs", None)
    kwargs = _typed(body, "chat_template_kwargs", dict, "an object") or {}
    body.pop("chat_template_kwargs", None)
    of_keys, needs_read = _of_keys(body, kwargs)
    continues = bool(_typed(body, "continue_final_message", bool, "true or false"))
    body.pop("continue_final_message", None)
    if continues and body.get("add_generation_prompt") is False:
        del body["add_generation_prompt"]
    return Asked(
        [messages],
        True,
        model,
        own,
        _choices(body),
        kwargs,
        of_keys,
        needs_read,
        continues=continues,
        returns_token_ids=_ids(body),
    )


def _of_keys(
    body: dict[str, Any], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """`Asked.key_kwargs` and `needs_read`. `kwargs`: what the body says for the template itself."""
    found: dict[str, Any] = {}
    needs_read: dict[str, tuple[str, ...]] = {}
    if documents := _typed(body, "documents", list, "a list of objects"):
        found["documents"] = documents
        needs_read["documents"] = ("documents",)
    if (effort := _typed(body, "reasoning_effort", str, "text")) is not None:
        if effort not in _EFFORTS:
            known = ", ".join(_EFFORTS)
            raise LineError(
                f"reasoning_effort must be one of {known}, got {shown(effort)}",
                "invalid_value",
                "reasoning_effort",
            )
        found["reasoning_effort"] = effort
        if "enable_thinking" not in kwargs:  # what some templates read in its place
            found["enable_thinking"] = effort != "none"
        if effort != "none":
            needs_read["reasoning_effort"] = ("reasoning_effort", "enable_thinking")
    for key in ("documents", "reasoning_effort"):
        body.pop(key, None)
    return found, needs_read


def _completion(body: dict[str, Any], model: str | None) -> Asked:
    body.pop("model", None)
    if "prompt" not in body:
        raise LineError("prompt is missing", "missing_required_parameter", "prompt")
    prompts = _prompts(body.pop("prompt"))
    own = _own(body, body.pop("max_tokens", None))
    if "logprobs" in body:
        own["logprobs"] = body.pop("logprobs")
    num_choices = _choices(body)
    if body.get("best_of") == num_choices:
        del body["best_of"]
    return Asked(prompts, False, model, own, num_choices, returns_token_ids=_ids(body))


def _own(body: dict[str, Any], max_tokens: Any) -> dict[str, Any]:
    own = {name: body.pop(name) for name in PLAIN if name in body}
    if max_tokens is not None:
        own["max_tokens"] = max_tokens
    if "seed" in body:
        seed = _typed(body, "seed", int, "a whole number")
        assert seed is not None
        if not -(2**63) <= seed < 2**63:
            raise LineError(f"seed must have 64 bits, got {shown(seed)}", "invalid_value", "seed")
        own["seed"] = seed & (2**63 - 1)  # OpenAI's may be negative
        del body["seed"]
    if (constraint := _constraint(body)) is not None:
        own[constraint[0]] = constraint[1]
    return own


def _constraint(body: dict[str, Any]) -> tuple[str, Any] | None:
    """(setting, value) of the form that an answer is to have."""
    asked = _typed(body, "response_format", dict, "an object") or {"type": "text"}
    body.pop("response_format", None)
    found: list[tuple[str, Any]] = []
    match asked.get("type"):
        case "text":
            pass
        case "json_object":
            found.append(("json_schema", json.dumps({"type": "object"})))
        case "json_schema":
            inner = asked.get("json_schema")
            schema = inner.get("schema") if isinstance(inner, Mapping) else None
            if not isinstance(schema, Mapping):
                raise LineError(
                    "response_format.json_schema.schema must be an object",
                    "invalid_value",
                    "response_format",
                )
            found.append(("json_schema", json.dumps(schema)))
        case other:
            raise LineError(
                f"response_format.type must be text, json_object or json_schema, got "
                f"{shown(other)}",
                "invalid_value",
                "response_format",
            )
    structured = _typed(body, "structured_outputs", dict, "an object") or {}
    body.pop("structured_outputs", None)
    for key, value in structured.items():
        if value is None:
            continue
        if key not in _STRUCTURED:
            raise unsupported(f"structured_outputs.{key}")
        if key == "json" and not isinstance(value, str):
            value = json.dumps(value)
        elif key == "json":
            _check_json(value)
        found.append((_STRUCTURED[key], value))
    if len(found) > 1:
        raise LineError(
            f"one form at most: {' and '.join(name for name, _ in found)} are asked for",
            "invalid_value",
            "structured_outputs",
        )
    assert all(name in CONSTRAINTS for name, _ in found)
    return found[0] if found else None


def _check_json(text: str) -> None:
    try:
        wrong = no_data_of_a_line(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise LineError(
            f"structured_outputs.json is not JSON: {error}", "invalid_value", "structured_outputs"
        ) from None
    if wrong is not None:
        raise LineError(f"structured_outputs.json {wrong}", "invalid_value", "structured_outputs")


def _prompts(prompt: Any) -> list[str | list[int]]:
    if isinstance(prompt, str) or _are(prompt, _is_whole):
        return [prompt]
    if _are(prompt, lambda one: isinstance(one, str) or _are(one, _is_whole)):
        return list(prompt)
    raise LineError(
        "prompt must be text, a list of token ids, or a list of either", "invalid_value", "prompt"
    )


def _are(values: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(values, list) and bool(values) and all(map(is_right, values))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _choices(body: dict[str, Any]) -> int:
    num_choices = _typed(body, "n", int, "a whole number")
    body.pop("n", None)
    if num_choices is not None and num_choices < 1:
        raise LineError(f"n must be at least 1, got {num_choices}", "invalid_value", "n")
    return 1 if num_choices is None else num_choices


def _ids(body: dict[str, Any]) -> bool:
    return bool(body.pop("return_token_ids", False))


def _typed(body: Mapping[str, Any], key: str, kind: type, what: str) -> Any:
    """The value of a key, None if it is not there. Raises LineError for one of another type."""
    value = body.get(key)
    if value is None:
        return None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise LineError(f"{key} must be {what}, got {shown(value)}", "invalid_value", key)
    return value
