"""Job files over an input: most are right, many have a mistake or two, some are no YAML.

Locations stay inside the case's folder, and sizes stay small enough for a case of some milliseconds
unless a limit of the job file itself should have refused them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml
from hypothesis import strategies as st

from batchinfer.sink import OUTPUT_COLUMNS
from tests.fuzz import arrow, texts
from tests.fuzz.odds import rarely
from tests.fuzz.tables import Input

MODEL = "jobs/demo/model"

_NUMBERS = (0, 1, -1, 2, 3, 1e-9, 0.5, 1e308, 2**31, 2**63, 2**63 - 1, -(2**63), 10**30)
_ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    "",
    " ",
    "auto",
    "none",
    "1",
    "a\nb",
    "a\x00b",
    "é👍",
    "x" * 300,
    [],
    [1],
    ["a", "a"],
    [None],
    [[]],
    {},
    {"a": 1},
    {"": None},
    {"a": {"b": [1, "c"]}},
    *_NUMBERS,
)
_LOCATIONS = (
    "in",
    "in/",
    "./in",
    "in/*",
    "in/*.parquet",
    "in/**",
    "in/[a-z]*.parquet",
    "in/a.parquet",
    "in/a.parquet/",
    "in/nothing/*.parquet",
    "nowhere",
    ".",
    "..",
    "out",
    "in/out",
    "job.yaml",
    "~",
    "~nobody/x",
    "file:///in",
    "s3://",
    "s3:in",
    "gs://bucket/in",
    "in/[",
    "in/{a,b}.parquet",
    "x" * 300,
    "a\x00b",
    "a\nb",
    "/dev/null",
    "/proc/self/fd",
    "/dev/null/out",
)
_TAKEN = ("id", *OUTPUT_COLUMNS)
#: How types of columns begin that can be a whole prompt.
_BEGIN = {
    "column": ("string", "large_string", "dictionary"),
    "messages_column": ("list<element: struct", "list<item: struct", "string", "large_list"),
    "token_ids_column": ("list<element: int", "list<item: int", "list<item: uint"),
}
_PIECES = (
    "",
    "\t",
    ":",
    "- ",
    "\n",
    "\x00",
    "\ufeff",
    "&a *a",
    "!!python/name:os.system",
    "'",
    '"',
)
_PIECES += ("{", "%YAML 1.1\n", "---\n", "...\n", "<<: *a", "? ", "| ", "!!binary x", "\u2028", "#")
_SECTIONS = (
    "input",
    "prompt",
    "model",
    "sampling",
    "packing",
    "checkpoint",
    "engine",
    "output",
    "limits",
)
_KEYS = {
    "input": ("path", "id_column", "keep_columns", "filter", "s3"),
    "prompt": (
        "column",
        "template",
        "messages",
        "messages_column",
        "token_ids_column",
        "on_too_long",
        "chat_template",
        "chat_template_kwargs",
        "continue_final_message",
    ),
    "model": (
        "path",
        "tokenizer",
        "revision",
        "quantization",
        "quantization_fallback",
        "dtype",
        "kv_cache_dtype",
        "lora",
        "max_model_len",
        "save_mode",
        "save_mode_gib",
        "cpu_offload_gib",
        "tensor_parallel_size",
        "trust_remote_code",
    ),
    "sampling": (
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "stop",
        "stop_token_ids",
        "seed",
        "n",
        "logprobs",
        "prompt_logprobs",
        "ignore_eos",
        "structured",
    ),
    "packing": ("order", "window_rows", "buffer_tokens", "batch_rows", "deduplicate"),
    "checkpoint": ("every_rows", "every_s"),
    "engine": (
        "name",
        "max_num_seqs",
        "max_num_batched_tokens",
        "gpu_memory_utilization",
        "options",
    ),
    "output": ("path", "s3", "single_writer"),
    "limits": ("max_failed_fraction", "max_seconds"),
}
_FITTING: dict[str, tuple[Any, ...]] = {
    "model.dtype": ("auto", "float32", "fp32", "bf16", "float16"),
    "model.max_model_len": (8, 16, 40, 2048, 2049),
    "model.kv_cache_dtype": ("auto", "fp8", "fp8_e4m3"),
    "sampling.max_tokens": (1, 2, 7),
    "sampling.temperature": (0.0, 0.01, 1, 2.0),
    "sampling.top_p": (0.1, 1),
    "sampling.top_k": (-1, 0, 1, 5),
    "sampling.min_p": (0, 0.5),
    "sampling.presence_penalty": (-2, 0.5),
    "sampling.repetition_penalty": (0.5, 1.1),
    "sampling.stop": ("x", ["x", "\n"], []),
    "sampling.stop_token_ids": ([], [5], [4095]),
    "sampling.seed": (0, 7, 2**63 - 1),
    "sampling.logprobs": (None, 0, 1, 3),
    "sampling.prompt_logprobs": (True, False),
    "sampling.structured": (
        {"choice": ["a", "b"]},
        {"regex": "[a-z]+"},
        {"json_schema": {"type": "object", "properties": {"a": {"type": "string"}}}},
        {"json_schema": {"type": "nonsense"}},
        {"json_schema": {}},
        {"grammar": 'root ::= "a" | "b"'},
        {"regex": "("},
        {"grammar": "("},
        {"choice": []},
    ),
    "packing.order": ("auto", "length", "prefix", "input"),
    "packing.window_rows": (1, 2, 3, 7, 64, 16384),
    "packing.buffer_tokens": (1, 10, 1000),
    "packing.batch_rows": (1, 2, 256),
    "packing.deduplicate": (True, False),
    "checkpoint.every_rows": (1, 2, 512),
    "checkpoint.every_s": (0.001, 0.05, 15),
    "engine.max_num_seqs": (1, 64, "auto"),
    "engine.options": (
        {},
        {"enforce_eager": True},
        {"enable_prefix_caching": False},
        {"block_size": 16, "seed": 3},
        {"max_logprobs": 5},
        {"logprobs_mode": "raw_logits"},
        {"hf_overrides": {"a": [1, None]}},
        {"no_such_option": 1},
        {"reasoning_parser": "deepseek_r1"},
        {"skip_tokenizer_init": True},
        {"load_format": "dummy"},
        {"enforce_eager": "maybe"},
        {"runner": "pooling"},
    ),
    "limits.max_failed_fraction": (0, 0.5, 1, 1.0),
    "limits.max_seconds": (1000, 1e6),
    "prompt.on_too_long": ("error", "truncate_left", "truncate_right"),
    "output.single_writer": (True, False),
}


@st.composite
def job_texts(draw: st.DrawFn, source: Input) -> str:
    """The text of a job file over these columns; the input is in `in`, results go to `out`."""
    columns = list(dict.fromkeys(n for table in source.tables for n in table.column_names))
    settings = draw(_settings(source, columns))
    for key in draw(st.lists(st.sampled_from(sorted(_FITTING)), max_size=4, unique=True)):
        section, _, name = key.partition(".")
        settings.setdefault(section, {})[name] = draw(st.sampled_from(_FITTING[key]))
    if settings["sampling"].get("temperature", 0) > 0 and draw(st.booleans()):
        settings["sampling"]["n"] = draw(st.sampled_from((2, 3)))
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 2, 0, 0, 0, 0)))):
        draw(_mutation(settings, columns))
    text = draw(_spelt(settings))
    return draw(_damaged(text)) if rarely(draw, 24) else text


@st.composite
def _settings(draw: st.DrawFn, source: Input, columns: Sequence[str]) -> dict[str, Any]:
    is_flat = all("/" not in name for name in source.shards)
    listed = [f"in/{name}" for name in source.shards if "/" not in name and "[" not in name]
    paths: list[Any] = ["in", "in/", "in/**/*.parquet"]
    if is_flat:
        paths += ["in/*.parquet", "in/*", "in/?*.parquet"]
        paths += [listed] * (len(listed) == len(source.shards))
    section: dict[str, Any] = {"path": draw(st.sampled_from(paths))}
    some = _of(columns)
    if columns and draw(st.booleans()):
        section["id_column"] = draw(some)
    if columns and draw(st.booleans()):
        free = [name for name in columns if name not in _TAKEN or rarely(draw, 10)]
        section["keep_columns"] = draw(st.lists(_of(free), max_size=4, unique=True))
    if rarely(draw, 4):
        section["filter"] = draw(texts.filters(columns))
    return {
        "version": 1,
        "name": "fuzz",
        "input": section,
        "prompt": draw(_prompt(source, columns)),
        "model": {"path": MODEL},
        "sampling": {"max_tokens": draw(st.integers(1, 9))},
        "output": {"path": "out"},
    }


def _of(columns: Sequence[str]) -> st.SearchStrategy[str]:
    """A column, rarely a name of none."""
    return st.sampled_from([*columns, *columns, "nosuchcolumn", *columns, *columns])


@st.composite
def _prompt(draw: st.DrawFn, source: Input, columns: Sequence[str]) -> dict[str, Any]:
    kind = draw(
        st.sampled_from(
            ("column", "template", "template", "messages", "messages_column", "token_ids_column")
        )
    )
    likely = _likely(source, kind)
    if kind == "template" or not (likely or kind == "messages" or rarely(draw, 10)):
        prompt: dict[str, Any] = {"template": draw(texts.templates(columns))}
    elif kind == "messages":
        roles = st.sampled_from(("user", "user", "system", "assistant", "tool", "developer"))
        message = st.fixed_dictionaries({"role": roles, "content": texts.templates(columns)})
        prompt = {kind: draw(st.lists(message, min_size=1, max_size=3))}
    else:
        prompt = {kind: draw(_of(likely or columns))}
    if kind in prompt and kind.startswith("messages") and rarely(draw, 5):
        prompt["continue_final_message"] = draw(st.booleans())
    if kind in prompt and kind.startswith("messages") and rarely(draw, 5):
        prompt["chat_template"] = draw(
            st.sampled_from(
                (
                    "{{ messages }}",
                    "{% for m in messages %}{{ m.content }}{% endfor %}",
                    "{{ messages[0]['content'] + messages[1]['content'] }}",
                    "{{ raise_exception('no') }}",
                    "{{ x }}",
                    "{% for",
                    "constant",
                )
            )
        )
        prompt["chat_template_kwargs"] = draw(
            st.sampled_from(
                (
                    {},
                    {"x": 1},
                    {"messages": []},
                    {"tools": 7},
                    {"tools": [{"type": "function", "function": {"name": "f"}}]},
                    {"add_generation_prompt": False},
                    {"enable_thinking": False},
                )
            )
        )
    return prompt


def _likely(source: Input, kind: str) -> list[str]:
    """Columns whose type begins as the prompt's would."""
    begin = _BEGIN.get(kind, ("nothing",))
    fields = (field for table in source.tables for field in table.schema)
    return list(dict.fromkeys(f.name for f in fields if str(f.type).startswith(begin)))


@st.composite
def _mutation(draw: st.DrawFn, settings: dict[str, Any], columns: Sequence[str]) -> None:
    """Change one thing in place."""
    section = draw(st.sampled_from(_SECTIONS))
    key = draw(st.sampled_from(_KEYS[section]))
    kind = draw(
        st.sampled_from(("odd", "odd", "odd", "text", "drop", "unknown", "section", "place"))
    )
    held = settings.get(section)
    inner = held if isinstance(held, dict) else {}
    if kind == "drop":
        name = draw(st.sampled_from([*sorted(settings), key]))
        settings.pop(name, None) if name in settings else inner.pop(name, None)
    elif kind == "section":
        settings[section] = draw(st.sampled_from(_ODD))
    elif kind == "unknown":
        inner[draw(st.sampled_from((key.upper(), key + "s", "x", "", "é", "a.b")))] = 1
        settings[section] = inner
    elif kind == "place":
        where = draw(st.sampled_from(("input", "input", "output", "model")))
        if isinstance(settings.get(where), dict):
            settings[where]["path"] = draw(st.sampled_from(_LOCATIONS))
    else:
        values = st.sampled_from(_ODD) if kind == "odd" else arrow.texts | _of(columns)
        inner[key] = draw(st.sampled_from(_LOCATIONS) if key == "path" else values)
        settings[section] = inner


@st.composite
def _spelt(draw: st.DrawFn, settings: dict[str, Any]) -> str:
    """As YAML in one of the ways people and programs write it."""
    style = draw(st.sampled_from(("block", "flow", "json", "alias")))
    if style == "json":
        return json.dumps(settings)
    text: str = yaml.safe_dump(
        settings,
        default_flow_style=style == "flow",
        allow_unicode=draw(st.booleans()),
        sort_keys=False,
        width=draw(st.sampled_from((40, 10_000))),
    )
    if style == "alias":
        return text.replace("name: fuzz", "name: &name fuzz").replace("out\n", "*name\n")
    return text


@st.composite
def _damaged(draw: st.DrawFn, text: str) -> str:
    """With a piece cut out, or one put in."""
    start = draw(st.integers(0, len(text)))
    length = draw(st.sampled_from((0, 1, 5, len(text))))
    piece = draw(st.sampled_from(_PIECES))
    return text[:start] + piece + text[start + length :]
