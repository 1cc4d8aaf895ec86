"""llama.cpp on the demo model: what requests get, beside transformers and llama.cpp's own words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from batchinfer.config import SamplingSettings, StructuredSettings
from batchinfer.engine.base import ResamplingEngine
from batchinfer.engine.demands.completion import Completion, CompletionDemand, CompletionRequest
from batchinfer.engine.llama_cpp import sampling as sampling_of_engine
from batchinfer.engine.llama_cpp.requests import requests_of
from batchinfer.errors import ConfigError, EngineDied, RowError
from batchinfer.llama_cpp.vocabulary import Vocabulary
from tests.support.gguf import complete, running
from tests.support.jobs import ROOT

pytestmark = pytest.mark.slow

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"type": "integer"}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def vocabulary(demo_gguf: Path) -> Vocabulary:
    return Vocabulary(str(demo_gguf))


@pytest.fixture(scope="module")
def prompts(vocabulary: Vocabulary) -> list[list[int]]:
    """Conversations of the kind that the demo model was trained on."""
    texts = pl.read_parquet(ROOT / "jobs/demo/prompts/*.parquet")["description"][:24].to_list()
    chats = (
        f"<|im_start|>user\nSummarize this software package in one line.\n\n{text}<|im_end|>\n"
        "<|im_start|>assistant\n"
        for text in texts
    )
    return [vocabulary.tokenize(chat, add_special=False).tolist() for chat in chats]


def text_of(vocabulary: Vocabulary, token_ids: np.ndarray) -> str:
    return b"".join(vocabulary.pieces[i] for i in token_ids.tolist()).decode("utf-8", "replace")


def test_tokens_do_not_depend_on_what_else_runs(demo_gguf: Path, prompts: list[list[int]]) -> None:
    """In float32: one at a time, all at once, and in so small steps that prompts are cut."""
    found: list[list[list[int]]] = []
    logprobs = []
    for engine in ({"max_num_seqs": 1}, {}, {"max_num_seqs": 3, "max_num_batched_tokens": 40}):
        with running(demo_gguf, sampling={"max_tokens": 24, "logprobs": 0}, engine=engine) as llama:
            done = complete(llama, *prompts)
        found.append([c.token_ids.tolist() for c in done])
        assert all(c.finish_reason in ("stop", "length") for c in done)
        logprobs.append(np.concatenate([np.asarray(c.token_logprobs) for c in done]))
    assert found[0] == found[1] == found[2]
    assert max(np.abs(other - logprobs[0]).max() for other in logprobs[1:]) < 1e-4


def test_logprobs_are_those_of_a_plain_forward_pass(
    demo_gguf: Path, prompts: list[list[int]]
) -> None:
    """Of the completion, its top list and the prompt, by transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    sampling = {"max_tokens": 12, "logprobs": 3, "prompt_logprobs": True}
    with running(demo_gguf, sampling=sampling, engine={"max_num_batched_tokens": 64}) as llama:
        done = complete(llama, *prompts[:4])
    model = AutoModelForCausalLM.from_pretrained(ROOT / "jobs/demo/model", dtype="float32").eval()
    for prompt, completion in zip(prompts, done, strict=False):
        whole = [*prompt, *completion.token_ids.tolist()]
        with torch.inference_mode():
            expected = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
        chosen = expected[range(len(whole) - 1), whole[1:]].numpy()
        num_prompt = len(prompt)
        of_prompt = np.asarray(completion.prompt_token_logprobs)
        ours = np.concatenate([of_prompt[1:], np.asarray(completion.token_logprobs)])
        assert np.isnan(of_prompt[0])
        assert np.abs(ours - chosen).max() < 1e-4
        likeliest = expected[num_prompt - 1 : -1].topk(3)
        assert np.abs(tops(completion.top_logprobs, 3) - likeliest.values.numpy()).max() < 1e-4
        assert completion.top_offsets.tolist() == list(
            range(0, 3 * len(completion.token_ids) + 1, 3)
        )


def test_a_seed_decides_a_sample_whatever_runs_beside_it(
    demo_gguf: Path, prompts: list[list[int]]
) -> None:
    sampling = {"max_tokens": 8, "temperature": 1.0, "top_p": 0.95, "top_k": 50, "seed": 1}
    with running(demo_gguf, sampling=sampling) as llama:
        (alone,) = complete(llama, prompts[0], seed=7)
        first, second = complete(llama, prompts[0], prompts[0], seed=7)
        (other,) = complete(llama, prompts[0], seed=2**62 + 7)
    assert alone.token_ids.tolist() == first.token_ids.tolist() == second.token_ids.tolist()
    assert other.token_ids.tolist() != alone.token_ids.tolist()


def test_all_bits_of_a_seed_count(demo_gguf: Path, prompts: list[list[int]]) -> None:
    sampling = {"max_tokens": 6, "temperature": 2.0, "seed": 1}
    with running(demo_gguf, sampling=sampling) as llama:
        found = {
            tuple(complete(llama, prompts[0], seed=seed)[0].token_ids.tolist())
            for seed in (5, 5 + 2**32, 5 + 2**62, 6)
        }
    assert len(found) == 4


def test_a_stop_text_is_cut_off_and_named(
    demo_gguf: Path, prompts: list[list[int]], vocabulary: Vocabulary
) -> None:
    """Also where it is put together of the ends of tokens."""
    with running(demo_gguf, sampling={"max_tokens": 20}) as llama:
        (free,) = complete(llama, prompts[0])
    text = text_of(vocabulary, free.token_ids)
    stop = text[7:10]
    with running(demo_gguf, sampling={"max_tokens": 20, "stop": ["never", stop]}) as llama:
        (stopped,) = complete(llama, prompts[0])
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert stopped.text == text[: text.index(stop)]
    assert stopped.token_ids.tolist() == free.token_ids[: len(stopped.token_ids)].tolist()


def test_a_stop_token_ends_a_completion(demo_gguf: Path, prompts: list[list[int]]) -> None:
    with running(demo_gguf, sampling={"max_tokens": 20}) as llama:
        (free,) = complete(llama, prompts[0])
    token = int(free.token_ids[2])
    with running(demo_gguf, sampling={"max_tokens": 20, "stop_token_ids": [token]}) as llama:
        (stopped,) = complete(llama, prompts[0])
    assert stopped.stop_reason == str(token)
    assert stopped.num_text_tokens == len(stopped.token_ids) - 1 <= 2


def test_the_models_own_end_can_be_ignored(demo_gguf: Path, prompts: list[list[int]]) -> None:
    with running(demo_gguf, sampling={"max_tokens": 60}) as llama:
        (free,) = complete(llama, prompts[0])
    assert (free.finish_reason, free.stop_reason) == ("stop", None)
    assert free.num_text_tokens == len(free.token_ids) - 1
    with running(demo_gguf, sampling={"max_tokens": 60, "ignore_eos": True}) as llama:
        (longer,) = complete(llama, prompts[0])
    assert (longer.finish_reason, len(longer.token_ids)) == ("length", 60)


@pytest.mark.parametrize(
    ("structured", "fits"),
    [
        ({"json_schema": SCHEMA}, lambda text: set(json.loads(text)) == {"name", "size"}),
        ({"choice": ["libs", 'say "hi"', "net"]}, lambda t: t in ("libs", 'say "hi"', "net")),
        ({"grammar": 'root ::= [a-c]{3} "!"'}, lambda t: len(t) == 4 and t[3] == "!"),
        ({"regex": "v[0-9]+(\\.[0-9]){2}"}, lambda t: re.fullmatch("v[0-9]+(\\.[0-9]){2}", t)),
    ],
)
def test_a_completion_has_the_form_that_is_asked_for(
    structured: dict[str, Any], fits: Any, demo_gguf: Path, prompts: list[list[int]],
    vocabulary: Vocabulary,
) -> None:  # fmt: skip
    sampling = {"max_tokens": 80, "structured": structured}
    with running(demo_gguf, sampling=sampling) as llama:
        done = complete(llama, *prompts[:6])
    ended = [c for c in done if c.finish_reason == "stop"]  # the others found no end in time
    assert ended
    for completion in ended:
        text = text_of(vocabulary, completion.token_ids[: completion.num_text_tokens])
        assert fits(text), text


@pytest.mark.parametrize(
    ("structured", "words"),
    [
        ({"grammar": "root ::= nothing"}, r"cannot read .*grammar, root ::= nothing: "),
        ({"json_schema": {"type": "string", "pattern": "(?<=a)b"}}, "json_schema.*cannot read"),
        ({"regex": "(?<=a)b"}, r"regex: .* is a look-around"),
    ],
)
def test_what_cannot_be_read_is_refused(
    structured: dict[str, Any], words: str, demo_gguf: Path
) -> None:
    """And never computed without it."""
    with (
        pytest.raises(ConfigError, match=words),
        running(demo_gguf, sampling={"structured": structured}),
    ):
        pass


def test_thoughts_are_not_separated_and_a_job_that_asks_is_refused() -> None:
    sampling = SamplingSettings(reasoning_parser="qwen3")
    with pytest.raises(ConfigError, match=r"parsers are vLLM's, and the engine llama_cpp has none"):
        requests_of(CompletionDemand("generate", sampling)).check()


@pytest.mark.parametrize("kind", ["presence_penalty", "frequency_penalty"])
def test_a_penalty_counts_what_the_completion_has(
    kind: str, demo_gguf: Path, prompts: list[list[int]]
) -> None:
    """At each position the likeliest token once the penalties are taken off; logprobs are raw."""
    sampling = {"max_tokens": 80, "ignore_eos": True, "logprobs": 20, kind: 2.0}
    with running(demo_gguf, sampling=sampling) as llama:
        done = complete(llama, *prompts[:6])
    num_changed = 0
    for completion in done:
        chosen = completion.token_ids.tolist()
        ids = tops(completion.top_token_ids, 20)
        for position, (candidates, logprobs) in enumerate(
            zip(ids, tops(completion.top_logprobs, 20), strict=True)
        ):
            counts = [chosen[:position].count(token) for token in candidates.tolist()]
            if kind == "presence_penalty":
                counts = [min(count, 1) for count in counts]
            best = int(np.argmax(logprobs - 2.0 * np.array(counts)))
            assert candidates[best] == chosen[position]
            num_changed += best != 0
    assert num_changed > 2


def test_a_repetition_penalty_counts_the_prompt_too(
    demo_gguf: Path, prompts: list[list[int]]
) -> None:
    def num_of_prompt(**settings: Any) -> int:
        with running(demo_gguf, sampling={"max_tokens": 24, **settings}) as llama:
            done = complete(llama, *prompts[:8])
        pairs = zip(prompts, done, strict=False)
        return sum(token in prompt for prompt, c in pairs for token in c.token_ids.tolist())

    assert num_of_prompt(repetition_penalty=3.0) < num_of_prompt() / 4


def tops(values: Any, k: int) -> np.ndarray:
    return np.asarray(values).reshape(-1, k)


def test_little_room_makes_sequences_wait_and_loses_none(
    demo_gguf: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences share a KV cache of one sequence's length where more does not fit."""
    from batchinfer.engine.llama_cpp import sizes

    with running(demo_gguf, sampling={"max_tokens": 12}) as llama:
        expected = [c.token_ids.tolist() for c in complete(llama, *prompts)]
    monkeypatch.setattr(sizes, "available_memory_bytes", lambda: 0)
    with running(demo_gguf, sampling={"max_tokens": 12}, model={"max_model_len": 512}) as llama:
        assert llama.facts.kv_cache_tokens == 512
        found: dict[int, list[int]] = {}
        most = 0
        for key, prompt in enumerate(prompts):
            llama.add(CompletionRequest(key, np.array(prompt, np.int32)))
        while len(found) < len(prompts):
            found |= {c.key: Completion.of(c).token_ids.tolist() for c in llama.step()}
            most = max(most, llama.num_running)
    assert [found[key] for key in range(len(prompts))] == expected
    assert 1 <= most < len(prompts)


def test_an_impossible_request_is_refused_and_others_continue(demo_gguf: Path) -> None:
    with running(demo_gguf, sampling={"max_tokens": 4}, model={"max_model_len": 64}) as llama:
        for prompt, words in (([5000], "5000 is not in"), ([], "0 prompt"), ([1] * 64, "64 prom")):
            with pytest.raises(RowError, match=words):
                llama.add(CompletionRequest(0, np.array(prompt, np.int32)))
        (done,) = complete(llama, [1, 5, 9])
        assert len(done.token_ids) > 0
        llama.close()
        with pytest.raises(EngineDied, match="closed"):
            llama.step()


def test_a_request_can_be_watched_and_given_up(demo_gguf: Path, prompts: list[list[int]]) -> None:
    with running(demo_gguf, sampling={"max_tokens": 12, "logprobs": 0}) as llama:
        expected, other = complete(llama, prompts[0], prompts[1])
        for key in (0, 1, 2):
            llama.add(CompletionRequest(key, np.array(prompts[min(key, 1)], np.int32)))
        assert llama.so_far(0) is None
        found: dict[int, Completion] = {}
        num_seen = []
        while len(found) < 2:
            found |= {answer.key: Completion.of(answer) for answer in llama.step()}
            if (so_far := llama.so_far(0)) is not None:
                tokens = Completion.of(so_far).token_ids.tolist()
                assert tokens == expected.token_ids[: len(tokens)].tolist()
                num_seen.append(len(tokens))
                llama.abort(2)
    assert num_seen == list(range(1, len(expected.token_ids)))
    assert sorted(found) == [0, 1]
    assert found[1].token_ids.tolist() == other.token_ids.tolist()


OWN: list[dict[str, Any]] = [
    {"max_tokens": 5, "logprobs": 2},
    {"max_tokens": 20, "temperature": 1.0},  # with the seed of its request
    {"max_tokens": 40, "structured": {"json_schema": SCHEMA}},
    {"max_tokens": 24, "stop": ["a"]},
    {"max_tokens": 8, "ignore_eos": True, "presence_penalty": 1.5},
]


def test_requests_that_are_sampled_in_their_own_ways_share_steps(
    demo_gguf: Path, prompts: list[list[int]]
) -> None:
    """Each gets what it gets in an engine whose job says so; what cannot be is its row's error."""
    ways = [SamplingSettings.model_validate(own) for own in OWN]
    cannot = SamplingSettings(ignore_eos=True, structured=StructuredSettings(regex="a+"))
    with running(demo_gguf) as llama:
        for key, way in enumerate(ways):
            prompt = np.array(prompts[0], np.int32)
            llama.add(CompletionRequest(key, prompt, seed=9, sampling=way))
        for refused in (cannot, SamplingSettings(structured=StructuredSettings(grammar="r ::= ("))):
            with pytest.raises(RowError):
                llama.add(CompletionRequest(9, np.array(prompts[0], np.int32), sampling=refused))
        done: dict[int, Completion] = {}
        while len(done) < len(ways):
            done |= {answer.key: Completion.of(answer) for answer in llama.step()}
    for key, own in enumerate(OWN):
        with running(demo_gguf, sampling=own) as llama:
            (alone,) = complete(llama, prompts[0], seed=9)
        found = done[key]
        assert found.token_ids.tolist() == alone.token_ids.tolist()
        assert (found.finish_reason, found.stop_reason) == (alone.finish_reason, alone.stop_reason)
        assert found.text == alone.text
        assert np.array_equal(found.top_token_ids, alone.top_token_ids)


def test_a_constraint_that_many_rows_have_is_read_once_whether_or_not_it_can_be(
    demo_gguf: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    read = sampling_of_engine.why_unreadable

    def counted(file: str, kind: str, constraint: str) -> str | None:
        tried.append(constraint)
        return read(file, kind, constraint) if constraint == "a+" else "it is odd"

    monkeypatch.setattr(sampling_of_engine, "why_unreadable", counted)
    prompt = np.array(prompts[0], np.int32)
    ways = [SamplingSettings(structured=StructuredSettings(regex=r)) for r in ("a+", "b+")]
    with running(demo_gguf) as llama:
        for key in range(3):
            llama.add(CompletionRequest(key, prompt, sampling=ways[0]))
            with pytest.raises(RowError, match="it is odd"):
                llama.add(CompletionRequest(9, prompt, sampling=ways[1]))
    assert tried == ["a+", "b+"]


def test_other_sampling_needs_no_other_engine(demo_gguf: Path, prompts: list[list[int]]) -> None:
    """What is refused changes nothing."""
    with running(demo_gguf, sampling={"max_tokens": 2, "ignore_eos": True}) as llama:
        assert isinstance(llama, ResamplingEngine)
        sampling = SamplingSettings(
            max_tokens=3, logprobs=1, structured=StructuredSettings(json_schema=SCHEMA)
        )
        llama.set_demand(CompletionDemand("generate", sampling))
        (completion,) = complete(llama, prompts[0])
        assert len(completion.token_ids) == 3 and completion.top_logprobs is not None
        unreadable = StructuredSettings(grammar="root ::= [")
        with pytest.raises(ConfigError, match=r"llama\.cpp cannot read"):
            llama.set_demand(CompletionDemand("generate", SamplingSettings(structured=unreadable)))
        assert len(complete(llama, prompts[0])[0].token_ids) == 3
