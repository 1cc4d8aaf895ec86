"""vLLM's parsers of thoughts: on texts in the demo model's tokenizer, and in an engine."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchinfer.config import SamplingSettings, StructuredSettings
from batchinfer.engine.demands.completion import Completion, CompletionDemand, CompletionRequest
from batchinfer.engine.vllm.reasoning import Splitter, has_budget, parser_names
from batchinfer.engine.vllm.settings import VllmSettings
from batchinfer.engine.vllm.setup import prepare_environment
from batchinfer.errors import ConfigError

pytestmark = [
    pytest.mark.real_engine,
    pytest.mark.xdist_group("engine"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own
]

MODEL = Path(__file__).parents[3] / "jobs" / "demo" / "model"
START, END, STOP = 4094, 4095, 2


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    prepare_environment(weights_bytes=13_906_376, is_local_model=True)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo model with two of its tokens as the marks of thoughts."""
    folder = tmp_path_factory.mktemp("thinker") / "model"
    shutil.copytree(MODEL, folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    replaced = {text for text, index in vocabulary.items() if index in (START, END)}
    for text in replaced:
        del vocabulary[text]
    tokenizer["model"]["merges"] = [
        pair for pair in tokenizer["model"]["merges"] if "".join(pair) not in replaced
    ]
    for index, text in ((START, "<think>"), (END, "</think>")):
        vocabulary[text] = index
        tokenizer["added_tokens"].append(
            tokenizer["added_tokens"][0] | {"id": index, "content": text, "special": False}
        )
    file.write_text(json.dumps(tokenizer))
    return str(folder)


def tokenizer_of(folder: str) -> Any:
    from vllm.tokenizers import get_tokenizer

    return get_tokenizer(folder)


def demand(parser: str, **sampling: Any) -> CompletionDemand:
    return CompletionDemand("generate", SamplingSettings(reasoning_parser=parser, **sampling))


def split(
    folder: str, parser: str, text: str, prompt: str = "", reason: str = "stop", **kwargs: Any
) -> Completion:
    tokenizer = tokenizer_of(folder)
    asked = dataclasses.replace(demand(parser), template_kwargs=kwargs)
    ids = tokenizer.encode(text, add_special_tokens=False)
    ids += [STOP] if reason == "stop" else []
    completion = Completion(
        0, token_ids=np.array(ids, np.int32), num_text_tokens=len(ids) - (reason == "stop"),
        finish_reason=reason,
    )  # fmt: skip
    splitter = Splitter(asked, {}, tokenizer)
    splitter.split(completion, tokenizer.encode(prompt, add_special_tokens=False))
    return completion


def told(completion: Completion) -> tuple[str | None, str | None, bool]:
    assert completion.error_type is None, completion.error_message
    return completion.reasoning, completion.text, completion.is_reasoning_cut


@pytest.mark.parametrize("parser", ["deepseek_r1", "qwen3"])
def test_a_thought_ends_at_its_mark_or_is_cut(thinker: str, parser: str) -> None:
    whole = split(thinker, parser, "<think>let me see</think>a tool")
    assert told(whole) == ("let me see", "a tool", False)
    # The template may have begun it.
    begun = split(thinker, parser, "let me see</think>a tool", prompt="a<think>")
    assert told(begun) == ("let me see", "a tool", False)
    cut = split(thinker, parser, "<think>let me", reason="length")
    assert told(cut) == ("let me", None, True)
    assert told(split(thinker, parser, "<think>let me", reason="stop")) == ("let me", None, True)
    # An answer that is empty is no thought that was cut.
    assert told(split(thinker, parser, "<think>let me see</think>")) == ("let me see", "", False)


def test_an_answer_after_a_thought_that_the_prompt_has_ended_is_whole(thinker: str) -> None:
    prompt = "a<think></think>"
    assert told(split(thinker, "deepseek_r1", "a tool", prompt)) == (None, "a tool", False)
    off = split(thinker, "qwen3", "a tool", prompt, enable_thinking=False)
    assert told(off) == (None, "a tool", False)


def test_a_parser_that_fails_is_an_error_of_its_row(thinker: str) -> None:
    splitter = Splitter(demand("deepseek_r1"), {}, tokenizer_of(thinker))
    splitter._of = lambda *_, **__: None  # type: ignore[assignment]
    completion = Completion(0, text="a", finish_reason="stop")
    splitter.split(completion, [])
    assert completion.error_type == "engine_error"
    assert "parser deepseek_r1 failed" in str(completion.error_message)


@pytest.mark.parametrize(
    ("parser", "sampling", "words"),
    [
        ("deepseek_r1", {}, "does not fit this model: .*start/end tokens"),
        ("openai_gptoss", {}, "does not tell it from the answer"),
    ],
)
def test_a_parser_that_does_not_fit_the_model_is_refused(
    parser: str, sampling: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        Splitter(demand(parser, **sampling), {}, tokenizer_of(str(MODEL)))


def test_the_names_read_in_vllms_source_are_those_it_has() -> None:
    from vllm.reasoning import ReasoningParserManager
    from vllm.sampling_params import SamplingParams

    assert parser_names() == set(ReasoningParserManager.list_registered())
    assert has_budget() == hasattr(SamplingParams(), "thinking_token_budget")


def test_a_thought_is_ended_by_its_budget_and_the_form_binds_the_answer_alone(thinker: str) -> None:
    from batchinfer.engine.vllm.engine import build_vllm_engine

    choice = StructuredSettings(choice=("yes", "no"))
    settings = VllmSettings(
        model_path=thinker,
        tokenizer_path=thinker,
        dtype="float32",
        max_model_len=128,
        weights_bytes=13_906_376,
        kv_bytes_per_token=6 * 2 * 2 * 64 * 4,
        demand=demand("deepseek_r1", max_tokens=24, thinking_budget_tokens=7, structured=choice),
    )
    engine = build_vllm_engine(settings)
    try:
        prompt = tokenizer_of(thinker).encode("a tool to edit<think>", add_special_tokens=False)
        engine.add(CompletionRequest(1, np.array(prompt, np.int32)))
        answers: list[Any] = []
        while not answers:
            answers += engine.step()
    finally:
        engine.close()
    (answer,) = answers
    assert answer.text in ("yes", "no") and not answer.is_reasoning_cut
    assert answer.reasoning and answer.token_ids.tolist().index(END) <= 8
