"""Thoughts and answers, told apart by vLLM's reasoning parsers.

Which parsers there are, and whether vLLM can end a thought, is read in its source: `validate` asks
too. A parser's own answer is taken, as vLLM's server takes it, with one question more: whether a
text without an answer is a thought that was cut, or one whose answer is empty. Must not know: how
an engine is built or driven.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from batchinfer.config import CONSTRAINTS, SamplingSettings, thaw
from batchinfer.engine.demands.completion import Completion, CompletionDemand
from batchinfer.engine.vllm.errors import first_line
from batchinfer.errors import ConfigError

_KEY = "sampling.reasoning_parser"
_TABLE = "_REASONING_PARSERS_TO_REGISTER"
_BUDGET = "thinking_token_budget"


def reasoning_problems(sampling: SamplingSettings, options: Mapping[str, Any]) -> Iterator[str]:
    """How the job's settings for thoughts are wrong, and what to do."""
    structured = options.get("structured_outputs_config")
    structured = structured if isinstance(structured, Mapping) else {}
    if structured.get("reasoning_parser"):
        yield (
            f"engine.options.structured_outputs_config.reasoning_parser cannot be given: set {_KEY}"
        )
    if sampling.reasoning_parser is None:
        return
    if options.get("skip_tokenizer_init"):
        yield f"engine.options.skip_tokenizer_init and {_KEY} do not go together: remove one"
    if structured.get("enable_in_reasoning") and (key := constraint_key(sampling)):
        yield (
            "engine.options.structured_outputs_config.enable_in_reasoning would hold thoughts to "
            f"{key}, too, beside {_KEY}: remove one of them"
        )
    name, known = sampling.reasoning_parser, parser_names()
    if known and name not in known and _plugin(options) is None:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known))}"
        yield f"{_KEY}: this vLLM has no parser {name}: {hint}"
    if sampling.thinking_budget_tokens is not None and not has_budget():
        yield "sampling.thinking_budget_tokens: this vLLM cannot end a thought: leave it out"


def constraint_key(sampling: SamplingSettings) -> str | None:
    """For messages: what in the job asks for structured completions."""
    if sampling.structured is not None:
        return f"sampling.structured.{sampling.structured.constraint[0]}"
    names = (name for name in CONSTRAINTS if sampling.per_row.sets(name))
    return next((f"sampling.per_row.{name}" for name in names), None)


@cache
def parser_names() -> frozenset[str]:
    """Those that vLLM brings; none where it is not installed."""
    for node in _source("reasoning", "__init__.py"):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            (target,) = node.targets
            if isinstance(target, ast.Name) and target.id == _TABLE:
                return frozenset(str(ast.literal_eval(key)) for key in node.value.keys if key)
    return frozenset()


@cache
def has_budget() -> bool:
    """Whether vLLM takes a limit for thoughts; True where it is not installed."""
    bodies = [
        node.body
        for node in _source("sampling_params.py")
        if isinstance(node, ast.ClassDef) and node.name == "SamplingParams"
    ]
    return not bodies or any(
        isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and line.target.id == _BUDGET
        for line in bodies[0]
    )


def _source(*parts: str) -> list[ast.stmt]:
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        return []
    file = Path(spec.origin).parent.joinpath(*parts)
    return ast.parse(file.read_text(encoding="utf-8")).body if file.exists() else []


def _plugin(options: Mapping[str, Any]) -> str | None:
    """A Python file that brings parsers of its own."""
    structured = options.get("structured_outputs_config")
    inner = structured if isinstance(structured, Mapping) else {}
    found = options.get("reasoning_parser_plugin") or inner.get("reasoning_parser_plugin")
    return str(found) if found else None


class Splitter:
    """A parser for a job's prompts. Raises ConfigError if it does not fit the model."""

    def __init__(
        self, demand: CompletionDemand, options: Mapping[str, Any], tokenizer: Any
    ) -> None:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.reasoning import ReasoningParserManager

        self._name = demand.sampling.reasoning_parser
        self._tokenizer = tokenizer
        self._template_kwargs = thaw(demand.template_kwargs)
        try:
            if plugin := _plugin(options):
                ReasoningParserManager.import_reasoning_parser(plugin)
            self._of = ReasoningParserManager.get_reasoning_parser(self._name)
            parser = self._parser()
            request = ChatCompletionRequest(
                messages=[], model="", chat_template_kwargs=self._template_kwargs
            )
            self._request = parser.adjust_request(request)
            parser.extract_reasoning("", self._request)
        except NotImplementedError as error:
            raise ConfigError(
                f"{_KEY}: vLLM's parser {self._name} finds where a thought ends and does not tell "
                "it from the answer: leave it out"
            ) from error
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{_KEY}: vLLM's parser {self._name} needs the Python package {error.name}, which "
                f"is not installed: pip install {error.name}"
            ) from error
        except Exception as error:  # a parser may raise anything over a model that is not its own
            raise ConfigError(
                f"{_KEY}: vLLM's parser {self._name} does not fit this model: {first_line(error)}"
            ) from error
        end = getattr(parser, "reasoning_end_str", None)
        has_marks = end and getattr(parser, "reasoning_start_str", None)
        if demand.sampling.thinking_budget_tokens is not None and not (
            has_marks or options.get("reasoning_config")
        ):
            raise ConfigError(
                f"sampling.thinking_budget_tokens: vLLM's parser {self._name} does not say how a "
                "thought is ended: leave it out"
            )
        # A mark that is a special token is to be seen, too.
        is_special = end in tokenizer.all_special_tokens
        self.skips_special_tokens = self._request.skip_special_tokens and not is_special

    def split(self, completion: Completion, prompt_token_ids: Sequence[int]) -> None:
        """Set text and thought of one that is whole; an error if the parser fails."""
        token_ids = completion.token_ids[: completion.num_text_tokens].tolist()
        if completion.text is None:
            completion.text = self._tokenizer.decode(
                token_ids, skip_special_tokens=self.skips_special_tokens
            )
        try:
            self._split(completion, completion.text, list(prompt_token_ids), token_ids)
        except Exception as error:
            completion.error_type = "engine_error"
            completion.error_message = (
                f"vLLM's reasoning parser {self._name} failed: {type(error).__name__}: "
                f"{first_line(error)}"
            )

    def _split(
        self,
        completion: Completion,
        text: str,
        prompt_token_ids: list[int],
        token_ids: list[int],
    ) -> None:
        parser = self._parser()
        reasoning, answer = parser.extract_reasoning(text, self._request)
        if answer is not None:
            completion.reasoning, completion.text = reasoning, answer
        elif parser.is_reasoning_end(token_ids):
            completion.reasoning, completion.text = reasoning, ""
        elif not parser.is_reasoning_end([*prompt_token_ids, *token_ids]):
            completion.reasoning, completion.text = reasoning or text, None
            completion.is_reasoning_cut = True
        # Else the prompt itself has ended the thought (a model that is told not to think), and
        # there is only an answer: the text as it is.

    def _parser(self) -> Any:
        """A new one, as some keep what they have seen."""
        return self._of(self._tokenizer, chat_template_kwargs=self._template_kwargs)
