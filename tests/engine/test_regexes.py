"""What is refused of a regular expression before a model is loaded is what no backend reads."""

from __future__ import annotations

from typing import Any

import llguidance
import numpy as np
import pytest
import xgrammar

from batchinfer.config import PerRowSettings, SamplingSettings, StructuredSettings
from batchinfer.engine.demands.completion import CompletionDemand, CompletionRequest
from batchinfer.engine.llama_cpp.requests import requests_of as of_llama
from batchinfer.engine.regexes import regex_problem
from batchinfer.engine.vllm.requests import requests_of
from batchinfer.errors import ConfigError, RowError

UNREAD = ["(?=a)b", "(?!a)b", "(?<=a)b", "(?<!a)b", r"(a)\1", "(?P<n>a)(?P=n)", r"\bfoo\b", "(?>a)"]
MISREAD = [r"\Aa", r"a\Z"]
READ = [
    "a+",
    "^a$",
    "(?i)a",
    r"\\b",
    r"[\b]",
    r"[(?=]a",
    r"\[(?:a|b)\]{1,3}?",
    r"(?P<n>a)",
    r"\(\?=a",
]


def reads(regex: str) -> bool:
    """Whether one of vLLM's backends does."""
    grammar = llguidance.grammar_from("regex", regex)
    if not llguidance.LLMatcher.validate_grammar(grammar):
        return True
    try:
        xgrammar.Grammar.from_regex(regex)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("regex", [*UNREAD, "(?(1)a)", "(?#a)b"])
def test_what_is_refused_is_read_by_no_backend(regex: str) -> None:
    assert regex_problem(regex) is not None and not reads(regex)


@pytest.mark.parametrize("regex", READ)
def test_what_is_read_is_not_refused(regex: str) -> None:
    assert regex_problem(regex) is None and reads(regex)


@pytest.mark.parametrize("regex", MISREAD)
def test_ends_of_a_text_would_be_read_as_letters(regex: str) -> None:
    problem = regex_problem(regex)
    assert problem is not None and "the whole completion has to match anyway" in problem


def demand(**structured: Any) -> CompletionDemand:
    sampling = SamplingSettings(structured=StructuredSettings(**structured))
    return CompletionDemand("generate", sampling)


SCHEMA = {"properties": {"pattern": {"type": "string", "pattern": "(?!x)y"}}}


@pytest.mark.parametrize(
    ("structured", "sentence"),
    [
        ({"regex": "a(?=b)"}, r"sampling.structured.regex: a(?=b): (?= is a look-around"),
        ({"json_schema": SCHEMA}, "sampling.structured.json_schema: (?!x)y: (?! is a look-around"),
    ],
)
def test_both_engines_refuse_it_before_the_model_is_looked_at(
    structured: dict[str, Any], sentence: str
) -> None:
    (problem,) = requests_of(demand(**structured)).problems({})
    assert problem.startswith(sentence)
    other = {"structured_outputs_config": {"backend": "lm-format-enforcer"}}
    assert not list(requests_of(demand(**structured)).problems(other))
    with pytest.raises(ConfigError) as caught:
        of_llama(demand(**structured)).check()
    assert str(caught.value) == problem


def test_what_a_schema_only_mentions_is_not_a_pattern() -> None:
    values: dict[str, Any] = {"const": {"pattern": "(?=a)"}, "enum": [{"pattern": "(?=a)"}]}
    assert not list(requests_of(demand(json_schema=values)).problems({}))


def test_in_a_row_it_is_the_rows_error() -> None:
    """Also where a compiler would take a letter for it."""
    rows = SamplingSettings(per_row=PerRowSettings(regex="form"))
    requests = requests_of(CompletionDemand("generate", rows))
    own = SamplingSettings(structured=StructuredSettings(regex=r"[0-9]{3}\Z"))
    request = CompletionRequest(0, np.array([5], np.int32), sampling=own)
    with pytest.raises(RowError, match="is not what grammar compilers read: leave it out"):
        requests.params(request)
