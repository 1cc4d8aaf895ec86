"""Every key that vLLM's requests have is honoured, without a bearing, or refused by its name."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from batchinfer.config import SamplingSettings
from batchinfer.openai_batch.bodies import Asked, asked_of
from batchinfer.openai_batch.keys import CHAT, COMPLETIONS, WITHOUT_BEARING
from batchinfer.openai_batch.lines import Line, LineError

REQUESTS = {CHAT: "ChatCompletionRequest", COMPLETIONS: "CompletionRequest"}
PROTOCOLS = {CHAT: "chat_completion", COMPLETIONS: "completion"}
#: What a line has to say, and for some keys what else is said.
LEAST = {CHAT: {"messages": [{"role": "user", "content": "a"}]}, COMPLETIONS: {"prompt": "a"}}
BESIDE = {"top_logprobs": {"logprobs": True}}
#: Keys of both endpoints, or of one, with a value that asks for something.
HONOURED: dict[str, Any] = {
    "model": "adapter",
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.5,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.5,
    "max_tokens": 5,
    "n": 2,
    "seed": 5,
    "stop": ["x"],
    "stop_token_ids": [5],
    "ignore_eos": True,
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "a+", "json": None},
    "return_token_ids": True,
}
HONOURED_AT: dict[str, dict[str, Any]] = {
    CHAT: {
        "messages": [{"role": "user", "content": "b"}],
        "max_completion_tokens": 5,
        "logprobs": True,
        "top_logprobs": 5,
        "reasoning_effort": "low",
        "documents": [{"title": "a", "text": "b"}],
        "continue_final_message": True,
        "chat_template_kwargs": {"enable_thinking": False},
    },
    COMPLETIONS: {"prompt": "b", "logprobs": 5},
}
REFUSED: dict[str, Any] = {
    "logit_bias": {"5": 1.0},
    "stream": True,
    "stream_options": {"include_usage": True},
    "use_beam_search": True,
    "watermarking": True,
    "include_stop_str_in_output": True,
    "min_tokens": 5,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "truncate_prompt_tokens": 5,
    "prompt_logprobs": 1,
    "logprob_token_ids": [5],
    "allowed_token_ids": [5],
    "bad_words": ["x"],
    "echo": True,
    "return_tokens_as_token_ids": True,
    "routed_experts_prompt_start": 1,
    "kv_transfer_params": {"a": 1},
    "ec_transfer_params": {"a": 1},
    "vllm_xargs": {"a": 1},
    "repetition_detection": {"max_pattern_size": 5},
    "thinking_token_budget": 5,
}
REFUSED_AT: dict[str, dict[str, Any]] = {
    CHAT: {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "required",
        "include_reasoning": False,
        "add_generation_prompt": False,
        "add_special_tokens": True,
        "chat_template": "{{ messages }}",
        "media_io_kwargs": {"image": {}},
        "mm_processor_kwargs": {"a": 1},
        "return_prompt_text": True,
    },
    COMPLETIONS: {"suffix": "x", "prompt_embeds": "x", "add_special_tokens": False},
}


def asked(url: str, body: dict[str, Any]) -> Asked:
    line = Line(1, "a", url, LEAST[url] | body)
    return asked_of(line, SamplingSettings(), ["model"], ["adapter"])


def fields(url: str) -> dict[str, ast.expr | None]:
    """Key -> default, as vLLM's source has them."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    openai = Path(spec.origin).parent / "entrypoints/openai"
    tree = ast.parse((openai / PROTOCOLS[url] / "protocol.py").read_text())
    (body,) = (
        node.body
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == REQUESTS[url]
    )
    return {
        node.target.id: node.value
        for node in body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and not node.target.id.startswith("_")
    }


def default_of(expression: ast.expr | None) -> Any:
    """None where it is computed."""
    if isinstance(expression, ast.Call):
        named = (word.value for word in expression.keywords if word.arg == "default")
        expression = next(named, expression.args[0] if expression.args else None)
    try:
        return None if expression is None else ast.literal_eval(expression)
    except ValueError:
        return None


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
def test_no_key_of_vllms_requests_is_left_undecided(url: str) -> None:
    """A newer vLLM's may be refused as unknown until somebody has read what it does."""
    decided = (HONOURED, HONOURED_AT[url], REFUSED, REFUSED_AT[url], WITHOUT_BEARING)
    found = fields(url)
    assert len(found) > 40
    assert found.keys() <= set().union(*decided)


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
def test_a_body_with_every_key_at_vllms_default_asks_for_no_more(url: str) -> None:
    """As clients write it that dump a whole request."""
    defaults = {key: default_of(value) for key, value in fields(url).items()}
    assert defaults["n"] == 1 and defaults["stop"] == [] and defaults["length_penalty"] == 1.0
    body = {key: value for key, value in defaults.items() if key not in LEAST[url]}
    body.pop("max_tokens")  # of a completion it is OpenAI's default, which is filled in later
    plain = asked(url, {key: value for key, value in body.items() if key in ("stop_token_ids",)})
    found = asked(url, body)
    assert found.own.pop("stop") == [] and found.own.pop("ignore_eos") is False
    assert found == plain


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
def test_a_key_that_is_not_done_here_refuses_its_line_by_name(url: str) -> None:
    for key, value in (REFUSED | REFUSED_AT[url]).items():
        with pytest.raises(LineError) as found:
            asked(url, {key: value})
        assert (found.value.refusal.param, found.value.refusal.code) == (
            key,
            "unsupported_parameter",
        )


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
def test_a_key_that_is_honoured_changes_what_is_asked(url: str) -> None:
    for key, value in (HONOURED | HONOURED_AT[url]).items():
        beside = BESIDE.get(key, {}) if url == CHAT else {}
        plain = asked(url, beside)
        assert asked(url, {**beside, key: value}) != plain, key


def test_a_number_is_not_taken_for_yes_or_no() -> None:
    """1 == True in Python, and not in JSON."""
    for key, value in (("stream", 0), ("min_tokens", False), ("skip_special_tokens", 1)):
        with pytest.raises(LineError, match=f"{key}: .* is not supported"):
            asked(CHAT, {key: value})


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
def test_whole_floats_are_whole_numbers_and_others_are_refused(url: str) -> None:
    own = {"top_k": 4.0, "seed": 7.0, "stop_token_ids": [5.0], "max_tokens": 8.0}
    found = asked(url, {**own, "n": 2.0})
    assert (found.own, found.num_choices) == (own, 2)
    assert all(isinstance(value, int) for value in (found.own["seed"], found.own["max_tokens"]))
    if url == CHAT:
        top = asked(url, {"logprobs": True, "top_logprobs": 3.0, "max_completion_tokens": 4.0})
        assert top.own == {"logprobs": 3, "max_tokens": 4}
    else:
        assert asked(url, {"prompt": [5.0, 6.0]}).prompts == [[5, 6]]
    for key in ("max_tokens", "n", "seed", "top_k"):
        for value in (8.5, float("inf"), float("nan")):
            with pytest.raises(LineError, match=key):
                asked(url, {key: value})
