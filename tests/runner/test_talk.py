"""A conversation: what is sent, what is remembered, and what a change of settings loads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from batchinfer.config import Job, job_from
from batchinfer.engine.base import Engine, EngineSpec
from batchinfer.engine.kinds import KINDS
from batchinfer.errors import ConfigError, InputError
from batchinfer.runner.factory import build_engine
from batchinfer.runner.talk import Talk
from batchinfer.testing import FakeEngine, FakePlan
from tests.support.fake_run import fake_kinds
from tests.support.jobs import Place, job

pytestmark = pytest.mark.slow  # chat templates are transformers'

SYSTEM = {"role": "system", "content": "Be brief."}


def settings(**sections: Any) -> Job:
    messages = {"messages": [SYSTEM, {"role": "user", "content": "{{ text }}"}]}
    return job_from(job(Place("/nowhere"), prompt=messages, **sections))


class Loads:
    """Builds engines, and remembers for what."""

    def __init__(self) -> None:
        self.specs: list[EngineSpec] = []
        self.error: Exception | None = None

    def __call__(self, spec: EngineSpec) -> Engine:
        self.specs.append(spec)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return build_engine(KINDS["vllm"](), spec)

    @property
    def quantizations(self) -> list[str]:
        return [spec.job.model.quantization for spec in self.specs]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    monkeypatch.setitem(KINDS, "vllm", fake_kinds(FakePlan())["vllm"])
    return Loads()


@pytest.fixture
def talk(loads: Loads) -> Iterator[Talk]:
    talk = Talk(settings(), loads)
    talk.open()
    yield talk
    talk.close()


def prompt_of(talk: Talk, text: str) -> str:
    """What would be sent for it."""
    stream = talk.ask(text, lambda: False)
    pieces = talk.prompter.encoder.pieces(stream._request.token_ids)
    return "".join(piece for piece, _ in pieces)


def say(talk: Talk, text: str) -> str:
    *_, completion = talk.ask(text, lambda: False)
    talk.keep(text, completion, "the answer")
    return "the answer"


def test_what_was_said_is_said_again_before_the_next_question(talk: Talk) -> None:
    """With what the job's system says; until it is cleared."""
    say(talk, "first {{ text }}")
    assert prompt_of(talk, "second") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nfirst {{ text }}<|im_end|>\n"
        "<|im_start|>assistant\nthe answer<|im_end|>\n"
        "<|im_start|>user\nsecond<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    talk.clear()
    assert "first" not in prompt_of(talk, "third") and "Be brief." in prompt_of(talk, "third")
    assert talk.messages == []


def test_a_question_that_is_too_long_is_not_remembered(talk: Talk) -> None:
    with pytest.raises(InputError, match="prompt_too_long"):
        talk.ask("word " * 3000, lambda: False)
    assert talk.messages == []


def test_sampling_changes_without_loading_the_model_again(talk: Talk, loads: Loads) -> None:
    before = talk.engine
    assert not talk.change(settings(sampling={"max_tokens": 3, "logprobs": None}))
    assert talk.engine is before and len(loads.specs) == 1
    *_, completion = talk.ask("hello", lambda: False)
    assert len(completion.token_ids) <= 3 and completion.token_logprobs is None
    assert talk.prompter.limit.max_tokens == 2045


def test_the_engine_is_for_one_question_at_a_time(talk: Talk, loads: Loads) -> None:
    """Room for others is memory, and time before the first answer."""
    assert loads.specs[0].job.engine.max_num_seqs == 1
    assert talk.change(settings(engine={"max_num_seqs": 2}))
    assert loads.specs[1].job.engine.max_num_seqs == 2


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"quantization": "fp32"}},
        {"engine": {"max_num_seqs": 2}},
        {"sampling": {"seed": 1, "temperature": 1.0}},
        {"sampling": {"reasoning_parser": "deepseek_r1"}},
        {"sampling": {"prompt_logprobs": True}},
    ],
)
def test_what_the_engine_is_built_from_loads_it_again(
    talk: Talk, loads: Loads, sections: dict[str, Any]
) -> None:
    """What was said stays said."""
    say(talk, "first")
    before = talk.engine
    assert isinstance(before, FakeEngine)
    assert talk.change(settings(**sections))
    assert before.is_closed and talk.engine is not before and len(loads.specs) == 2
    assert "first" in prompt_of(talk, "second")


def test_a_change_that_is_refused_leaves_the_engine_that_runs(talk: Talk, loads: Loads) -> None:
    before = talk.engine
    with pytest.raises(ConfigError, match="awq"):
        talk.change(settings(model={"quantization": "awq"}))
    with pytest.raises(ConfigError, match="leaves no room for a prompt"):
        talk.change(settings(sampling={"max_tokens": 2048}))
    assert talk.engine is before and len(loads.specs) == 1
    assert talk.prompter.limit.max_tokens == 2032


@pytest.mark.parametrize("kind", [ConfigError, RuntimeError])
def test_a_model_that_cannot_be_loaded_gives_way_to_the_one_before(
    talk: Talk, loads: Loads, kind: type[Exception]
) -> None:
    loads.error = kind("no memory for that")
    with pytest.raises(kind, match="no memory for that"):
        talk.change(settings(model={"quantization": "fp32"}))
    assert loads.quantizations == ["auto", "fp32", "auto"]
    assert say(talk, "still here")


def test_texts_that_are_scored_have_no_answers(loads: Loads) -> None:
    scored = job_from(
        job(Place("/nowhere"), task="score") | {"sampling": {}, "prompt": {"column": "text"}}
    )
    with pytest.raises(ConfigError, match="chat needs task: generate"):
        Talk(scored, loads)
