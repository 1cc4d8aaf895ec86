"""Quantization by name: what a checkpoint is, what runs where, what is refused and what really ran.

The real engine runs every name that this CPU can run (see benchmarks/quantization.py for a table).
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from batchinfer.cli.doctor import show_quantizations
from batchinfer.config.precision import QuantizationName
from batchinfer.engine.vllm.machine import this_machine
from batchinfer.engine.vllm.support import SUPPORT
from batchinfer.errors import ConfigError
from batchinfer.quantization import (
    METHODS,
    RECIPES,
    SCHEMES,
    TABLE,
    Checkpoint,
    Choice,
    DeviceSupport,
    Machine,
    Support,
    check_hint,
    choose,
    detect,
    for_this_machine,
    markdown_list,
    record_of,
    why_not,
)
from tests.support.cpus import CPUS, HAS_BFLOAT16, runs_here
from tests.support.jobs import MODEL, ROOT, Place, job, rows, run, write_job
from tests.support.models import read_model
from tests.support.run_many import engine_facts, run_many

COMPRESSED = frozenset({"compressed-tensors"})
AMX = Machine(
    "cpu",
    cpu_flags=frozenset({"avx512f", "amx_tile", "amx_bf16"}),
    packages=COMPRESSED,
    engine="vllm",
)
PLAIN_CPU = Machine("cpu", cpu_flags=frozenset({"avx2"}), packages=COMPRESSED, engine="vllm")
H200 = Machine("cuda", compute_capability=(9, 0), packages=COMPRESSED, engine="vllm")
A100 = Machine("cuda", compute_capability=(8, 0), packages=COMPRESSED, engine="vllm")
T4 = Machine("cuda", compute_capability=(7, 5), packages=COMPRESSED, engine="vllm")
B200 = Machine("cuda", compute_capability=(10, 0), packages=COMPRESSED, engine="vllm")
BNB_CPU = Machine("cpu", packages=COMPRESSED | {"bitsandbytes"}, engine="vllm")
UNKNOWN = Machine(None, engine="vllm")


def compressed(
    weights: dict[str, Any], activations: dict[str, Any] | None = None
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def ints(num_bits: int | str, strategy: str = "channel") -> dict[str, Any]:
    return {"type": "int", "num_bits": num_bits, "strategy": strategy, "group_size": 128}


def floats(num_bits: int, strategy: str, group_size: int | None = None) -> dict[str, Any]:
    return {
        "type": "float",
        "num_bits": num_bits,
        "strategy": strategy,
        "group_size": group_size,
    }


def choice(
    asked: str, scheme: str, machine: Machine, *, has_experts: bool = False, **options: Any
) -> Choice:
    defaults = {"dtype": "bfloat16", "is_dtype_asked": False}
    checkpoint = Checkpoint(scheme, "x", has_experts)
    return choose(asked, checkpoint, machine, **defaults | options)


# The table.


def test_the_job_file_knows_the_names_of_the_table_and_no_other() -> None:
    assert get_args(QuantizationName) == tuple(record.name for record in TABLE)


def test_every_scheme_has_one_name() -> None:
    named = [
        scheme
        for record in TABLE
        if record.name not in ("fp32", "fp16", "bf16")
        for scheme in record.schemes
    ]
    assert sorted(named) == sorted(SCHEMES)


def test_a_name_has_the_schemes_that_some_device_runs_or_refuses() -> None:
    for record in TABLE:
        devices = [d for d in map(record.on, (PLAIN_CPU, H200)) if isinstance(d, DeviceSupport)]
        schemes = {scheme for d in devices for scheme in (*d.schemes, *d.refused)}
        assert not devices or schemes == set(record.schemes), record.name
        assert record.takes_plain == any(d.online or d.made_by for d in devices), record.name


def test_vllms_table_has_only_names_that_a_job_can_give() -> None:
    for support in SUPPORT.values():
        assert support.names.keys() <= {record.name for record in TABLE}


def test_what_runs_is_asked_of_the_machines_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"cpu": Support("Other", {"int4": "it has its own formats"})}
    monkeypatch.setitem(sys.modules, "batchinfer.engine.other", SimpleNamespace())
    module = SimpleNamespace(SUPPORT=table)
    monkeypatch.setitem(sys.modules, "batchinfer.engine.other.support", module)
    other = Machine("cpu", engine="other")
    assert record_of("int4").on(other) == "it has its own formats"
    assert record_of("nf4").on(other) == "not yet in this version"  # our code is for vLLM
    assert isinstance(record_of("nf4").on(BNB_CPU), DeviceSupport)


def test_every_folder_of_methods_is_a_method_and_none_is_left_out() -> None:
    folders = {
        path.parent.name.replace("_", "-")
        for path in (ROOT / "batchinfer" / "quantization" / "methods").glob("*/record.py")
    }
    assert sorted(folders) == sorted(method.name for method in METHODS)
    for method in METHODS:
        named = [n for r in method.recipes for n in (r.write, r.make, r.convert)]
        named += [method.vllm.module] if method.vllm else []
        assert all(find_spec(name) for name in named if name), method.name


def test_each_recipe_is_made_in_one_way() -> None:
    """A module rounds its weights, llm-compressor calibrates it, or a module makes it all."""
    for recipe in RECIPES.values():
        ways = (recipe.write, recipe.make, recipe.modifiers)
        assert len([way for way in ways if way]) == 1, recipe.method
        assert (recipe.converts is None) == (recipe.convert is None)
        assert recipe.make or not recipe.options
        assert (recipe.texts == "none") == (recipe.modifier is None)


def test_the_documented_table_is_the_programs() -> None:
    assert f"\n{markdown_list('vllm')}\n" in (ROOT / "docs" / "quantization.md").read_text()


# Detection.


@pytest.mark.parametrize(
    ("settings", "scheme"),
    [
        (None, "plain"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "awq", "w_bit": 4}, "awq"),
        ({"quant_method": "gptq", "bits": 4, "sym": True}, "gptq"),
        ({"quant_method": "gptq_marlin", "bits": 8}, "gptq-8bit"),
        (compressed(ints(8), ints(8, "token")), "w8a8"),
        (compressed(ints(8)), "w8a16"),
        (compressed(ints(4, "group")), "w4a16"),
        (compressed(ints(4, "group"), ints(8, "token")), "w4a8"),
        (compressed(floats(8, "channel"), floats(8, "token")), "fp8-channel"),
        (compressed(floats(8, "tensor"), floats(8, "tensor")), "fp8-tensor"),
        (compressed(floats(8, "block"), floats(8, "group", 128)), "fp8-block"),
        (compressed(floats(8, "group", 32), floats(8, "group", 32)), "mxfp8"),
        (compressed(floats(4, "tensor_group", 16)), "nvfp4"),
        (compressed(floats(4, "group", 32)), "mxfp4"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8-block"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8-tensor"),
        ({"quant_method": "fp8", "kv_cache_scheme": "static"}, "fp8-tensor"),  # AutoFP8's
        ({"quant_method": "fp8", "kv_cache_quant_algo": "FP8"}, "fp8-tensor"),
        ({"quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "fp8-tensor"),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8}},
            "fp8-tensor",
        ),
        ({"quant_method": "quark", "kv_cache_scheme": {"num_bits": 8}}, "quark"),
        ({"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}, "nvfp4"),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}}, "fp8-tensor"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bnb-4bit"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bnb-8bit"),
        (compressed(ints("8"), ints("8", "token")), "w8a8"),
        (compressed(ints(8), ints(8, "token") | {"symmetric": False}), "w8a8"),
        (compressed(ints(4, "group") | {"symmetric": False}), "w4a16"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "a": {"weights": ints(4, "group")},
                    "b": {"weights": floats(8, "channel"), "input_activations": floats(8, "token")},
                    "attention": {"weights": None},
                },
            },
            "compressed-tensors, several schemes",
        ),
        ({"quant_algo": "MIXED_PRECISION"}, "modelopt, several schemes"),
        ({"quant_method": "exl3", "bits": 3.0}, "exl3"),
        ({"quant_method": "torchao"}, "torchao"),
    ],
)
def test_a_checkpoint_is_what_its_familys_settings_say(
    settings: dict[str, Any] | None, scheme: str
) -> None:
    assert detect(settings, "config.json").scheme == scheme


@pytest.mark.parametrize(
    "settings",
    [
        {"producer": {}, "quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}},
        {"quant_algo": None, "kv_cache_quant_algo": "FP8"},
        {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"a": 1}},
    ],
)
def test_settings_of_the_kv_cache_alone_leave_a_model_unquantized(settings: dict[str, Any]) -> None:
    assert detect(settings, "folder/config.json").scheme == "plain"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "squeeze9"}, "squeeze9"),
        ({"bits": 4}, "missing"),
        ({"quant_method": "awq", "bits": 3}, "awq with 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "sym": False}, "4 bits, asymmetric"),
        (
            {"quant_method": "awq", "bits": "4"},
            "bits is the string '4', .* without quotation marks",
        ),
        (
            {"quant_method": "gptq", "bits": 4, "desc_act": "false"},
            "desc_act is the string 'false'",
        ),
        (compressed(ints(8) | {"symmetric": False}, ints(8, "token")), "8-bit asymmetric int wei"),
        (compressed(ints(2, "group")), "2-bit int weights by group"),
        (compressed(ints(4, "group"), floats(8, "token")), "8-bit float activations"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
        ({"quant_method": "compressed-tensors"}, "lack 'config_groups'"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {}},
            "no config_groups of weights",
        ),
        ({"quant_algo": None}, "missing"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": None}}}, "g"),
    ],
)
def test_a_family_or_scheme_nobody_knows_is_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        detect(settings, "folder/config.json")
    assert "folder/config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "gptq", "bits": 4, "desc_act": True, "group_size": 128}, "gptq"),
        ({"quant_method": "gptq", "bits": 4, "desc_act": True, "group_size": -1}, None),
        ({"quant_method": "gptq", "bits": 4, "desc_act": False, "group_size": 128}, None),
        (compressed(ints(4, "group") | {"actorder": "group"}), "int4"),
        (compressed(ints(4, "group") | {"actorder": "weight"}), None),
    ],
)
def test_groups_out_of_order_are_refused_where_nothing_computes_them(
    settings: dict[str, Any], name: str | None
) -> None:
    checkpoint = detect(settings, "config.json")
    options: dict[str, Any] = {"dtype": "bfloat16", "is_dtype_asked": False}
    assert choose("auto", checkpoint, H200, **options).name
    if name is None:
        assert choose("auto", checkpoint, PLAIN_CPU, **options).name
        return
    words = rf"{name}\) cannot run here: .* activation order .* a checkpoint for .*{name}"
    with pytest.raises(ConfigError, match=words):  # as there are others that have none
        choose("auto", checkpoint, PLAIN_CPU, **options)


@pytest.mark.parametrize(
    ("name", "scheme", "is_refused"),
    [
        ("Llama-3-8B-AWQ", "plain", True),
        ("Llama-3-8B-AWQ", "gptq", True),
        ("Llama-3-8B-AWQ", "awq", False),
        ("Llama-3-8B-AWQ-8bit", "w8a16", False),
        ("gemma-3-4b-it-qat-int4-unquantized", "plain", False),
        ("Llama-3-8B-gptq-merged-bf16", "plain", False),
        ("Llama-3-8B-AWQ", "w4a16", False),  # llm-compressor's AWQ
        ("Qwen-7B-GPTQ-Int4", "gptq", False),
        ("Qwen-7B-GPTQ-Int8", "gptq", True),
        ("model.w8a8", "w8a8", False),
        ("model-FP8-KV", "plain", False),  # the cache, not the weights
        ("model_fp8_block", "w8a8", True),
        ("mawqtest", "plain", False),
        ("Quark-FP8", "quark", False),
        ("Llama-3-8B-bf16", "awq", True),
        ("Llama-3-8B-bf16", "plain", False),
        ("Llama-3-8B-bnb-4bit-bf16", "bnb-4bit", False),
        ("Llama-3-8B-4bit", "plain", True),
        ("Llama-3-8B-4bit", "gptq-8bit", True),
        ("Llama-3-8B-bnb-4bit", "bnb-8bit", True),
        ("Llama-3-8B-4-bit", "w8a8", True),
        ("Llama-3-8B-4-bit", "mxfp4", False),
        ("Llama-3-8bit", "fp8-block", False),
        ("Llama-3-14-bits", "plain", False),
        ("Phi-4-mini-AWQ-INT4", "torchao", False),  # torchao's own
        ("Phi-4-mini-exl3", "torchao", True),
        ("model-MXFP8", "fp8-block", True),
    ],
)
def test_a_folders_name_may_not_say_another_quantization_than_its_files(
    name: str, scheme: str, is_refused: bool
) -> None:
    if not is_refused:
        check_hint(name, Checkpoint(scheme, "x"))
        return
    with pytest.raises(ConfigError, match=f"name {name} says .*, or (write model.quant|rename)"):
        check_hint(name, Checkpoint(scheme, "x"))


# What runs where.


@pytest.mark.parametrize(
    ("name", "scheme", "machine", "dtype", "reason"),
    [
        ("fp8", "plain", H200, None, None),
        ("fp8", "fp8-channel", H200, None, None),
        ("fp8", "plain", AMX, None, None),
        ("fp8", "fp8-block", AMX, None, None),
        ("fp8", "plain", PLAIN_CPU, None, "amx_tile"),
        ("fp8", "fp8-channel", AMX, None, "scalar reference of 30 million"),
        ("fp8", "plain", H200, "float32", "not computed in float32"),
        ("int8", "w8a8", PLAIN_CPU, None, None),
        ("int8", "w8a8", PLAIN_CPU, "float32", None),
        ("int8", "w8a8", PLAIN_CPU, "float16", "aborts the process"),
        ("int8", "w8a8", H200, "float16", None),
        ("int8", "w8a16", PLAIN_CPU, None, "4-bit weights"),
        ("int8", "plain", H200, None, None),
        ("int4", "plain", PLAIN_CPU, None, None),
        ("int8", "plain", PLAIN_CPU, "float16", "aborts the process"),
        ("int8", "plain", Machine("cpu", engine="vllm"), None, "package compressed-tensors"),
        ("int4", "w4a8", H200, None, "packed weights"),
        ("fp4", "nvfp4", PLAIN_CPU, None, "no CPU kernel"),
        ("fp4", "nvfp4", T4, None, "compute capability 8.0, this one has 7.5"),
        (
            "fp4",
            "nvfp4",
            Machine("cuda", (9, 0), engine="vllm"),
            None,
            "package compressed-tensors",
        ),
        ("bf16", "plain", T4, "bfloat16", "8.0"),
        ("none", "plain", T4, "bfloat16", "float16 or float32: bfloat16 needs compute capability"),
        ("int8", "w8a8", T4, "bfloat16", "but in float16: bfloat16 needs compute capability 8.0"),
        ("int8", "w8a8", T4, "float16", None),
        ("nf4", "plain", PLAIN_CPU, "float32", "package bitsandbytes"),
        ("nf4", "bnb-4bit", BNB_CPU, "float32", None),
        ("nf4", "bnb-8bit", BNB_CPU, None, None),
        ("qtip", "qtip", H200, None, None),
        ("qtip", "qtip-full", PLAIN_CPU, "float32", None),
        ("exl3", "exl3", PLAIN_CPU, None, None),
        ("exl3", "plain", PLAIN_CPU, None, "it needs a checkpoint (ExLlamaV3's"),
        ("gguf", "gguf", H200, None, "vLLM reads no GGUF files here"),
        ("fp8", "fp8-block", UNKNOWN, None, None),
    ],
)
def test_what_a_machine_cannot_run_has_a_reason(
    name: str, scheme: str, machine: Machine, dtype: str | None, reason: str | None
) -> None:
    found = why_not(name, Checkpoint(scheme, "x"), machine, dtype)
    assert (found is None) == (reason is None)
    assert reason is None or (found is not None and reason in found)


def test_fp8_of_a_plain_model_is_vllms_own_on_a_gpu_and_by_blocks_on_a_cpu() -> None:
    assert choice("fp8", "plain", H200).engine_quantization == "fp8_per_channel"
    assert choice("fp8", "plain", A100).engine_quantization == "fp8"  # weight-only
    assert choice("fp8", "plain", H200, has_experts=True).engine_quantization == "fp8"
    assert choice("fp8", "plain", AMX).engine_quantization == "fp8_per_block"
    assert choice("fp8", "fp8-block", AMX).engine_quantization is None


def test_a_name_that_a_plain_model_lacks_is_made_unless_it_is_computed_on_the_fly() -> None:
    assert choice("int8", "plain", PLAIN_CPU).made_by == "int8"
    assert choice("int4", "plain", H200).made_by == "int4"
    assert choice("fp4", "plain", H200).made_by == "nvfp4"
    for name, scheme, machine in (
        ("fp8", "plain", AMX),
        ("fp8", "plain", H200),
        ("nf4", "plain", BNB_CPU),
        ("int8", "w8a8", H200),
        ("none", "plain", H200),
        ("auto", "plain", H200),
    ):
        assert choice(name, scheme, machine).made_by is None
    assert "rounded to nearest once" in for_this_machine(record_of("int4"), PLAIN_CPU)[1]


def test_nf4_is_our_plugins_for_a_plain_model_and_for_a_checkpoint() -> None:
    for scheme in ("plain", "bnb-4bit", "bnb-8bit"):
        assert choice("nf4", scheme, BNB_CPU).engine_quantization == "batchinfer_bitsandbytes"
    assert choice("auto", "bnb-4bit", BNB_CPU).name == "nf4"


def test_names_of_a_dtype_are_unquantized_and_auto_is_what_the_checkpoint_is() -> None:
    assert choice("bf16", "plain", H200).name == choice("auto", "plain", H200).name == "none"
    assert choice("auto", "w4a16", H200).name == choice("int4", "w4a16", H200).name == "int4"


def test_a_family_that_only_vllm_knows_is_left_to_it() -> None:
    found = choice("auto", "torchao", H200)
    assert (found.name, found.engine_quantization) == ("torchao", None)
    assert "left to vLLM" in found.notes[0]
    with pytest.raises(ConfigError, match="write auto"):
        choice("int8", "torchao", H200)


def test_fp4_is_weight_only_below_blackwell_and_that_is_said() -> None:
    assert "only the weights are quantized" in choice("auto", "nvfp4", H200).notes[0]
    assert choice("auto", "nvfp4", B200).notes == ()
    for machine in (H200, B200):  # what is made of an unquantized model has no activations in it
        (note,) = choice("fp4", "plain", machine).notes
        assert "its fp4 checkpoint (NVFP4A16, weights only) is made once" in note
        assert "(NVFP4A16, weights only) and kept" in for_this_machine(record_of("fp4"), machine)[1]
    assert "(W8A8) is made once" in choice("int8", "plain", H200).notes[0]
    assert "native from 10.0" in for_this_machine(record_of("fp4"), H200)[1]


def test_a_checkpoints_dtype_gives_way_and_one_that_was_asked_for_does_not() -> None:
    found = choice("auto", "w8a8", PLAIN_CPU, dtype="float16")
    assert found.dtype == "bfloat16"
    assert "float16" in found.notes[0]
    with pytest.raises(ConfigError, match=r"auto \(int8\) .* float16 aborts"):
        choice("auto", "w8a8", PLAIN_CPU, dtype="float16", is_dtype_asked=True)


def test_where_bfloat16_does_not_run_a_checkpoint_in_it_is_computed_in_float16() -> None:
    machine = replace(T4, packages=T4.packages | {"bitsandbytes"})
    for asked, scheme in (
        ("auto", "plain"),
        ("int8", "plain"),
        ("int4", "w4a16"),
        ("fp8", "plain"),
        ("awq", "awq"),
        ("nf4", "plain"),
    ):
        found = choice(asked, scheme, machine)
        assert found.dtype == "float16", asked
        assert "is computed in float16 here, and not in bfloat16" in found.notes[0]
        assert choice(asked, scheme, machine, dtype="float16").dtype == "float16"
    assert choice("bf16", "plain", H200).dtype == choice("auto", "plain", BNB_CPU).dtype
    with pytest.raises(ConfigError, match=r"bfloat16 needs compute capability 8\.0"):
        choice("auto", "plain", T4, is_dtype_asked=True)


@pytest.mark.parametrize(
    ("asked", "scheme", "words"),
    [
        ("awq", "plain", "awq, but the checkpoint is unquantized.* write none"),
        ("gptq", "plain", "unquantized"),
        ("awq", "gptq", "GPTQ, 4 bits .* write gptq or auto"),
        ("int8", "w4a16", "write int4 or auto"),
        ("none", "awq", "write awq or auto"),
        ("bf16", "fp8-block", "write fp8 or auto"),
        ("fp8", "w8a8", "write int8 or auto"),
    ],
)
def test_a_name_that_contradicts_the_checkpoint_is_refused_with_what_to_write(
    asked: str, scheme: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        choice(asked, scheme, H200, fallback=("awq", "bf16"))


MACHINES = (
    AMX,
    PLAIN_CPU,
    H200,
    A100,
    T4,
    B200,
    BNB_CPU,
    UNKNOWN,
    *CPUS.values(),
    Machine("cpu", engine="vllm"),
    Machine("cuda", compute_capability=(7, 0), engine="vllm"),
    Machine("cuda", compute_capability=(9, 0), engine="vllm"),
)
DTYPES = ("bfloat16", "float16", "float32")
ADVICE = {
    "model": r"([Ww]ith model\.dtype: auto )?this model can run as ([^;]+)$",
    "name": r"(?:: |or )write (?:(\w+)(?: or (auto))?)(?:, or give another checkpoint)?$",
    "other": r"With model\.quantization: auto( and model\.dtype: auto)? give "
    r"(the unquantized model)?(?: or )?(?:a checkpoint for (.+))? \(see",
    "format": r"give a checkpoint in that format",
    "nothing": r"No checkpoint of this model can run here",
}


@pytest.mark.parametrize("has_experts", [False, True])
@pytest.mark.parametrize("asked_dtype", [None, *DTYPES])
def test_advice_is_accepted_for_every_name_checkpoint_and_machine(
    asked_dtype: str | None, has_experts: bool
) -> None:
    num_found = dict.fromkeys(ADVICE, 0)

    @functools.cache
    def takes(name: str, scheme: str, machine: Machine, dtype: str | None) -> bool:
        asked: dict[str, Any] = {"dtype": dtype, "is_dtype_asked": True} if dtype else {}
        try:
            return bool(choice(name, scheme, machine, has_experts=has_experts, **asked))
        except ConfigError:
            return False

    def check(name: str, scheme: str, machine: Machine) -> None:
        dtype = record_of(name).dtype or asked_dtype if name != "auto" else asked_dtype
        asked: dict[str, Any] = {"dtype": dtype, "is_dtype_asked": True} if dtype else {}
        try:
            choice(name, scheme, machine, has_experts=has_experts, **asked)
            return
        except ConfigError as error:
            text = str(error)
        found = {kind: re.search(f"(?i:{words})", text) for kind, words in ADVICE.items()}
        assert any(found.values()), text
        for kind, match in found.items():
            num_found[kind] += match is not None
        if match := found["model"]:
            for advised in match[2].split(" or "):
                assert takes(advised, scheme, machine, None if match[1] else dtype), text
        if match := found["name"]:
            assert all(takes(n, scheme, machine, dtype) for n in match.groups() if n), text
        if match := found["other"]:
            tried = None if match[1] else dtype
            assert not match[2] or takes("auto", "plain", machine, tried)
            for advised in match[3].split(" or ") if match[3] else ():
                schemes = record_of(advised).schemes
                assert any(takes("auto", s, machine, tried) for s in schemes), (advised, text)
        if found["format"]:
            assert any(takes(name, s, machine, dtype) for s in record_of(name).schemes), text
        if found["nothing"]:
            assert not any(takes("auto", s, machine, None) for s in SCHEMES), text

    for machine in MACHINES:
        for name in ("auto", *(record.name for record in TABLE)):
            for scheme in (*SCHEMES, "experts_int8"):
                check(name, scheme, machine)
    assert num_found["model"] and num_found["name"] and num_found["other"]


def test_of_an_unquantized_model_a_name_that_runs_nowhere_is_refused_with_what_runs() -> None:
    with pytest.raises(
        ConfigError, match=r"gguf cannot run here: vLLM reads no .* can run as none"
    ):
        choice("gguf", "plain", H200)
    assert choice("gguf", "plain", H200, fallback=("fp8",)).name == "fp8"
    with pytest.raises(ConfigError, match=r"but the checkpoint is AWQ .* write awq or auto"):
        choice("gguf", "awq", H200, fallback=("fp8",))


def test_a_trellis_checkpoint_is_given_to_vllm_under_its_own_name() -> None:
    """Which is what finds our plugin; nothing else becomes one on the way."""
    for scheme, name in (("qtip", "qtip"), ("qtip-full", "qtip"), ("exl3", "exl3")):
        for machine in (PLAIN_CPU, H200):
            found = choice("auto", scheme, machine)
            assert (found.name, found.engine_quantization, found.dtype) == (name, name, "bfloat16")
    with pytest.raises(ConfigError, match=r"unquantized .* give a checkpoint .* --method qtip"):
        choice("qtip", "plain", PLAIN_CPU)
    with pytest.raises(ConfigError, match=r"exl3, but the checkpoint is QTIP .* write qtip or"):
        choice("exl3", "qtip", H200)
    with pytest.raises(ConfigError, match=r"has experts, and trellises code only linear layers"):
        choice("auto", "exl3", H200, has_experts=True)


def test_experts_run_only_where_there_are_kernels_for_them() -> None:
    assert choice("int8", "plain", AMX, has_experts=True).made_by == "int8"
    for name, scheme in (("int8", "plain"), ("auto", "w8a8"), ("auto", "awq")):
        with pytest.raises(ConfigError, match=r"has experts, .* need amx_tile, which this CPU lac"):
            choice(name, scheme, PLAIN_CPU, has_experts=True)
    found = choice("int8", "plain", PLAIN_CPU, has_experts=True, fallback=("nf4", "bf16"))
    assert (found.name, found.made_by, found.dtype) == ("none", None, "bfloat16")
    with pytest.raises(ConfigError, match=r"only linear layers. This model can run as none$"):
        choice("nf4", "plain", PLAIN_CPU, has_experts=True)
    assert choice("auto", "plain", PLAIN_CPU, has_experts=True).name == "none"


def test_a_fallback_is_the_first_that_this_machine_can_run_and_is_warned_of() -> None:
    found = choice("fp4", "plain", PLAIN_CPU, fallback=("fp8", "awq", "fp32", "bf16"))
    assert (found.name, found.dtype) == ("none", "float32")
    assert found.warnings == (
        "quantization fp32 is used instead of fp4: vLLM has no CPU kernel for it",
    )
    assert choice("fp4", "plain", T4, fallback=("fp8", "bf16")).engine_quantization == "fp8"
    assert choice("fp8", "plain", H200, fallback=("bf16",)).warnings == ()
    assert choice("fp4", "plain", PLAIN_CPU, fallback=("int8", "bf16")).made_by == "int8"
    with pytest.raises(
        ConfigError, match=r"amx_tile.*\(nor can nf4\)\. This model can run as none or int8"
    ):
        choice("fp8", "plain", PLAIN_CPU, fallback=("nf4",))


# Runs.


@pytest.fixture
def filled(folder: Place) -> Place:
    folder.write_parquet("in/a.parquet", rows(8))
    return folder


def test_a_fallback_is_warned_of_in_the_log(filled: Place, tmp_path: Path) -> None:
    model = {"path": str(MODEL), "quantization": "fp4", "quantization_fallback": ["fp32"]}
    ended = run(write_job(tmp_path, job(filled, model=model)))
    assert ended.code == 0, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if "used instead of fp4" in line]
    assert "warning" in line.lower()


@pytest.mark.parametrize(
    ("machine", "works"),
    [
        (PLAIN_CPU, "none fp32 fp16 bf16 int8 int4 awq gptq qtip exl3"),
        (AMX, "none fp32 fp16 bf16 int8 int4 fp8 awq gptq qtip exl3"),
        (T4, "none fp32 fp16 int8 int4 fp8 awq gptq qtip exl3"),
        (H200, "none fp32 fp16 bf16 int8 int4 fp8 fp4 awq gptq qtip exl3"),
    ],
)
def test_doctor_has_a_line_for_each_name_and_says_which_work(
    machine: Machine, works: str, capsys: pytest.CaptureFixture[str]
) -> None:
    show_quantizations(machine)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [name for _, name, *_ in lines] == [record.name for record in TABLE]
    assert " ".join(name for mark, name, *_ in lines if mark == "ok") == works


def test_explain_says_what_a_name_means_here(filled: Place, tmp_path: Path) -> None:
    path = write_job(tmp_path, job(filled, model={"path": str(MODEL), "quantization": "fp4"}))
    explained = run(path, command=("explain",))
    assert f"fp4: {record_of('fp4').meaning}. Not here: vLLM has no CPU kernel" in explained.stdout


@dataclass(frozen=True)
class Case:
    """A job of one name: of the demo model, or of a checkpoint `kind` of it."""

    kind: str | None
    num_quantized: int  # of 24 layers
    method: str  # within the name of vLLM's class for them


def cases() -> dict[str, Case]:
    """Name of the job, which begins with the quantization's -> what is run."""
    fp8 = Case(None, 24, "Fp8PerBlock") if runs_here("fp8") else Case(None, 0, "Unquantized")
    plain = Case(None, 0, "Unquantized")
    return {
        "none": plain,
        "fp32": plain,
        "fp16": plain,
        "bf16": plain,
        "fp8": fp8,
        "int8": Case("w8a8", 24, "CompressedTensorsW8A8Int8"),
        "int4": Case("w4a16", 24, "CompressedTensorsWNA16"),
        "awq": Case("awq", 24, "AWQ"),
        "gptq": Case("gptq", 24, "GPTQ"),
        "nf4": Case(None, 24, "Bits4LinearMethod"),
        "nf4-checkpoint": Case("bnb-nf4", 24, "Bits4LinearMethod"),
        "nf4-nested": Case("bnb-nf4-nested", 24, "Bits4LinearMethod"),
        "nf4-fp4": Case("bnb-fp4", 24, "Bits4LinearMethod"),
        "nf4-int8": Case("bnb-int8", 24, "Bits8LinearMethod"),
        "int8-made": Case(None, 24, "CompressedTensorsW8A8Int8"),
        "int4-made": Case(None, 24, "CompressedTensorsWNA16"),
    }


def write_case(name: str, case: Case, folder: Place, tmp_path: Path) -> tuple[Path, Path]:
    """Its job file and its model."""
    from tests.support.checkpoints import write_checkpoint  # imports torch

    model = write_checkpoint(case.kind, tmp_path / name) if case.kind else MODEL
    settings = job(
        folder,
        name,
        prompt={"template": "{{ description }}"},
        model={
            "path": str(model),
            "quantization": name.partition("-")[0],
            "max_model_len": 1024,
        },
        sampling={"max_tokens": 4, "prompt_logprobs": True},
        engine={"max_num_seqs": 8, "options": {"kv_cache_memory_bytes": 1 << 25}},
    )
    if name == "fp8":
        settings["model"]["quantization_fallback"] = ["bf16"]
    return write_job(tmp_path, settings, f"{name}.yaml"), model


def check_layers(name: str, case: Case, file: str, model: Path) -> None:
    """Every layer was quantized as the name says, and memory is as it was estimated."""
    facts = json.loads(pq.read_metadata(file).metadata[b"batchinfer"])
    layers = facts["engine"]["extra"]["layers"]
    assert (layers["num_quantized_layers"], layers["num_layers"]) == (case.num_quantized, 24)
    estimated = read_model(
        str(model),
        quantization=name.partition("-")[0],
        quantization_fallback=("bf16",),
        machine=this_machine(),
    ).needs
    assert estimated is not None
    assert layers["weights_bytes"] == pytest.approx(estimated.weights, rel=0.05), name
    (method,) = layers["methods"]
    assert case.method in method
    if "nf4" not in name:  # whose operators are no class of vLLM's
        assert (sum(layers["kernels"].values()) == 24) == (case.num_quantized == 24)


def check_means(means: Mapping[str, float]) -> None:
    """Mean log-probability of the prompts' tokens, by job."""
    # Rounding costs little where the packing is right; by chance a token of 4096 has -8.3.
    assert np.ptp(np.array([*means.values()], np.float64)) < 0.3, means
    assert means["none"] == means["bf16" if HAS_BFLOAT16 else "fp32"]
    assert means["bf16"] == pytest.approx(means["fp32"], abs=0.01)
    assert means["fp16"] == pytest.approx(means["fp32"], abs=0.01)
    # One rounding, three formats; the same by compressed-tensors.
    if runs_here("int4"):
        assert means["int4"] == pytest.approx(means["awq"], abs=0.01) == means["gptq"]
    assert means["int8-made"] == pytest.approx(means["int8"], abs=0.02)
    # What is read is what was written: block scales are the same numbers again.
    assert means["nf4-checkpoint"] == means["nf4"] == pytest.approx(means["nf4-nested"], abs=0.01)


@pytest.mark.real_engine
@pytest.mark.timeout(600)
def test_every_name_quantizes_every_layer_or_is_refused_on_this_cpu(
    folder: Place, tmp_path: Path
) -> None:
    prompts = pl.read_parquet(ROOT / "jobs" / "demo" / "prompts" / "*.parquet").head(8)
    folder.write_parquet("in/a.parquet", prompts)
    written = {n: write_case(n, case, folder, tmp_path) for n, case in cases().items()}
    aborts = job(folder, "aborts", model={"path": str(tmp_path / "int8"), "dtype": "float16"})
    paths = [path for path, _ in written.values()]
    paths.append(write_job(tmp_path, aborts, "aborts.yaml"))
    paths.append(written["int8-made"][0])  # whose checkpoint is found now
    environ = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    *done, refused, (code, again) = run_many(*paths, timeout_s=560, environ=environ)
    assert (code, again["rows"]) == (0, 8)
    made = sorted((tmp_path / "cache" / "batchinfer" / "models").glob("[!.]*"))
    assert [folder.name.split("-")[0] for folder in made] == [
        name for name in ("int4", "int8") if runs_here(name)
    ]
    assert refused[0] == 2
    assert "dtype float16 aborts the process in vLLM on a CPU" in refused[1]["message"]
    means: dict[str, float] = {}
    for (name, case), (code, told) in zip(cases().items(), done, strict=True):
        if name != "fp8" and not runs_here(name.partition("-")[0]):  # fp8 has a fallback
            assert code == 2, (name, told)
            assert "cannot run here: it needs the kernel cpu_gemm_wna16" in told["message"]
            continue
        assert code == 0, (name, told)
        file = folder.url(name, "a.parquet")
        check_layers(name, case, file, written[name][1])
        column = pl.read_parquet(file)["prompt_token_logprobs"].explode().drop_nans()
        mean = column.drop_nulls().mean()
        assert isinstance(mean, float)
        means[name] = mean
    check_means(means)


@pytest.mark.real_engine
def test_a_mixture_of_experts_runs_unquantized_and_is_never_left_half_quantized(
    folder: Place, tmp_path: Path
) -> None:
    from tests.support.checkpoints import write_experts  # imports torch

    model = write_experts(tmp_path / "experts")
    folder.write_parquet("in/a.parquet", rows(4))
    paths = []
    for name in ("none", "nf4"):
        settings = job(
            folder,
            name,
            model={"path": str(model), "quantization": name, "max_model_len": 256},
            engine={"max_num_seqs": 8, "options": {"kv_cache_memory_bytes": 1 << 25}},
        )
        paths.append(write_job(tmp_path, settings, f"{name}.yaml"))
    ran, refused = run_many(*paths)
    assert ran[0] == 0, ran
    layers = engine_facts(folder.url("none", "a.parquet"))["extra"]["layers"]
    file_bytes = (model / "model.safetensors").stat().st_size
    in_memory = file_bytes * (1 if HAS_BFLOAT16 else 2)
    assert layers["weights_bytes"] == pytest.approx(in_memory, rel=0.05)
    assert refused[0] == 2
    assert "the model has experts, and bitsandbytes quantizes only lin" in refused[1]["message"]
