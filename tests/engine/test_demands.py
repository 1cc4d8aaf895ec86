"""Kinds of demand are found by their name, in the contract and in each engine."""

from __future__ import annotations

import importlib

import pytest

from batchinfer.config import Job
from batchinfer.engine import demands
from batchinfer.engine.base import Answer, Demand
from batchinfer.engine.demands.completion import Completion, CompletionDemand
from batchinfer.engine.kinds import demands_in, engine_kind
from batchinfer.engine.vllm.requests import requests_of
from batchinfer.errors import ROW_ERROR_KINDS
from batchinfer.tasks import TASKS
from batchinfer.testing import FakePlan, fake_kind
from batchinfer.testing.engine import answers_of
from tests.support.jobs import Place, job


def demand_of(task: str) -> Demand:
    """What a job of plain settings asks."""
    plain = {key: value for key, value in job(Place("nowhere")).items() if key != "sampling"}
    return TASKS[task].of(Job.model_validate({**plain, "task": task})).demand


@pytest.mark.parametrize("task", TASKS)
def test_each_engine_has_a_module_for_what_a_task_asks(task: str) -> None:
    demand = demand_of(task)
    module = importlib.import_module(f"batchinfer.engine.demands.{demand.wants}")
    assert type(demand).__module__ == module.__name__
    assert demand.wants in engine_kind("vllm").wants and demand.wants in fake_kind().wants
    assert list(requests_of(demand).problems({})) == []
    answers_of(demand, FakePlan())


def test_an_engine_serves_nothing_else() -> None:
    assert set(engine_kind("vllm").wants) <= set(demands_in(demands))
    assert set(fake_kind().wants) <= set(demands_in(demands))


def test_an_error_is_a_completion_without_tokens() -> None:
    kind = next(iter(ROW_ERROR_KINDS))
    completion = Completion.of(Answer(3, error_type=kind, error_message="why"))
    assert (completion.key, completion.error_type, completion.error_message) == (3, kind, "why")
    assert len(completion.token_ids) == 0
    assert Completion.of(completion) is completion


def test_a_demand_names_what_asks_for_prompt_logprobs() -> None:
    """For messages."""
    generating, scoring = demand_of("generate"), demand_of("score")
    assert isinstance(generating, CompletionDemand) and isinstance(scoring, CompletionDemand)
    assert generating.prompt_logprobs_key == "sampling.prompt_logprobs"
    assert scoring.prompt_logprobs_key == "task: score"
