"""What of a job concerns a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batchinfer.config import ENGINES, Job
from batchinfer.engine.kinds import KINDS
from batchinfer.engine.vllm.kind import VllmKind
from batchinfer.errors import ConfigError
from batchinfer.serving import prepare
from batchinfer.testing import fake_kind
from tests.support.jobs import MODEL, Place, job


@pytest.fixture
def here(tmp_path: Path) -> Place:
    """No input is there, and no output: neither is looked at."""
    return Place(str(tmp_path / "nothing"))


def parsed(place: Place, **sections: Any) -> Job:
    return Job.model_validate(job(place, **sections))


def test_what_does_not_concern_a_server_is_named(here: Place) -> None:
    asked = parsed(
        here,
        prompt={
            "messages": [{"role": "user", "content": "{{ text }}"}],
            "chat_template": "chatml",
            "on_too_long": "truncate_left",
        },
        sampling={"n": 2, "temperature": 1.0, "top_p": 0.5},
        limits={"max_seconds": 5},
    )
    assert prepare(asked).ignored == [
        *("input", "prompt.messages", "prompt.on_too_long", "sampling.logprobs", "sampling.n"),
        *("packing", "checkpoint", "output", "limits"),
    ]
    assert not Path(here.root).exists()


def test_a_job_that_scores_is_refused(here: Place) -> None:
    settings = job(here, task="score", prompt={"column": "text"})
    del settings["sampling"]
    with pytest.raises(ConfigError, match="task: score cannot be served: a server answers"):
        prepare(Job.model_validate(settings))


def test_an_engine_without_a_server_is_refused(
    here: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, "fake", fake_kind)
    monkeypatch.setattr("batchinfer.serving.order.ENGINES", ENGINES)
    unserved = parsed(here)
    unserved = unserved.model_copy(
        update={"engine": unserved.engine.model_copy(update={"name": "fake"})}
    )
    with pytest.raises(
        ConfigError, match="name: fake has no server in this version, vllm and llama_cpp have"
    ):
        prepare(unserved)


def test_an_engine_knows_that_requests_bring_seeds(here: Place) -> None:
    """On a CPU vLLM then reads prompts whole, as it cannot rewind its random state."""
    assert prepare(parsed(here)).spec.demand.sampling.uses_seeds


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"path": "/no/such/model"}, "there is no folder"),
        ({"path": str(MODEL), "quantization": "gptq"}, "gptq"),
        ({"path": str(MODEL), "lora": "/no/such/adapter"}, "/no/such/adapter"),
    ],
)
def test_a_model_is_refused_as_by_a_run(here: Place, model: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(parsed(here, model=model))


def test_a_model_too_large_is_refused_before_it_is_loaded(
    here: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: VllmKind, spec: Any) -> None:
        raise ConfigError("it does not fit")

    monkeypatch.setattr(VllmKind, "check_fit", refuse)
    with pytest.raises(ConfigError, match="it does not fit"):
        prepare(parsed(here))
