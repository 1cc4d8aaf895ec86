"""The real engine on the demo model: what comes out of a request, what is refused, what dies."""

from __future__ import annotations

import dataclasses
import errno
import gc
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchinfer.config import Job, PerRowSettings, SamplingSettings, StructuredSettings
from batchinfer.engine.demands.completion import (
    Completion,
    CompletionDemand,
    CompletionRequest,
)
from batchinfer.engine.hardware import GIB, Memory
from batchinfer.engine.host import available_memory_bytes
from batchinfer.engine.vllm import plugin as vllm_plugin
from batchinfer.engine.vllm.errors import construction_error
from batchinfer.engine.vllm.fit import auto_sizes
from batchinfer.engine.vllm.layers import whole_model
from batchinfer.engine.vllm.settings import VllmSettings
from batchinfer.engine.vllm.setup import (
    OWNER_PID_VARIABLE,
    PLUGINS_VARIABLE,
    describe_devices,
    engine_arguments,
    prepare_environment,
)
from batchinfer.engine.vllm.sizes import default_sizes, graph_sizes
from batchinfer.errors import ConfigError, EngineDied, RowError
from batchinfer.plan import Chunk
from batchinfer.runner.loop import Loop
from batchinfer.runner.ready import ReadyWork
from batchinfer.runner.width.control import TunedWidth, WidthReport
from batchinfer.runner.width.memory import WidthMemory
from batchinfer.tasks import Result
from batchinfer.telemetry import Counters
from tests.support.jobs import Place, run_python
from tests.support.jobs import job as job_settings
from tests.support.knee import SteppedClock
from tests.support.models import read_model

pytestmark = [
    pytest.mark.real_engine,
    pytest.mark.xdist_group("engine"),  # one worker: its fixtures build an engine for the module
    pytest.mark.filterwarnings("ignore"),  # vLLM's and torch's own
]

REPOSITORY = Path(__file__).parents[3]
MODEL = str(REPOSITORY / "jobs" / "demo" / "model")
EOS = 2
SCORED = SamplingSettings(max_tokens=24, logprobs=2, prompt_logprobs=True)
SETTINGS = VllmSettings(
    model_path=MODEL,
    tokenizer_path=MODEL,
    dtype="float32",  # on the CPU bit-equal whatever shares a batch
    max_model_len=256,
    weights_bytes=13_906_376,
    kv_bytes_per_token=6 * 2 * 2 * 64 * 4,
    demand=CompletionDemand("generate", SCORED),
)


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    prepare_environment(weights_bytes=SETTINGS.weights_bytes, is_local_model=True)
    yield
    os.environ.clear()
    os.environ.update(before)


def with_sampling(**changes: Any) -> VllmSettings:
    """Not validated, as what vLLM refuses by itself is tested too."""
    return dataclasses.replace(
        SETTINGS, demand=CompletionDemand("generate", SamplingSettings().model_copy(update=changes))
    )


def structured(**constraint: Any) -> dict[str, Any]:
    return {"structured": StructuredSettings.model_construct(**constraint)}


def prompt(text: str) -> np.ndarray:
    chat = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    return np.array(tokenizer().encode(chat).ids, np.int32)


def tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(f"{MODEL}/tokenizer.json")


def text_of(completion: Completion) -> str:
    ids = completion.token_ids[: completion.num_text_tokens]
    return str(tokenizer().decode(ids.tolist()))


def run(engine: Any, *requests: CompletionRequest, num_before: int = 0) -> dict[int, Completion]:
    """All of them, and the `num_before` that were added before."""
    for request in requests:
        engine.add(request)
    completions: list[Completion] = []
    while len(completions) < num_before + len(requests):
        completions += engine.step()
    return {c.key: c for c in completions}


PROMPTS = [
    prompt(f"Summarize this software package in one line.\n\n{description}")
    for description in (
        "This package installs the shared library of a program that streams music.",
        "A tool that fetches configuration files and keeps them up to date on many hosts.",
        "Documentation for a Python module that parses dates.",
    )
]


def from_checkpoint(kind: str, weight: Any) -> Any:
    """What the loader makes of a weight [out, in] in a checkpoint of this kind."""
    from batchinfer.quantization.methods.bitsandbytes.dequantize import dequantized
    from tests.support.checkpoints import KINDS

    pieces = KINDS[kind].pack(weight)
    named = [(f"layer.{name}", tensor) for name, tensor in pieces.items()]
    ((name, whole),) = dequantized(reversed(named), kind.split("-")[1])
    assert name == "layer.weight"
    return whole


def held(method: Any, weight: Any) -> Any:
    """What a layer computes with after it was given `weight` [out, in]."""
    import torch

    layer = torch.nn.Module()
    arrived = weight.to(method.dtype or torch.bfloat16)
    layer.weight = torch.nn.Parameter(arrived, requires_grad=False)
    method.quantize(layer, layer.weight.data)
    return method.apply(layer, torch.eye(weight.shape[1])).T


def bits4(quant_type: str = "nf4", *, is_checkpoint: bool) -> Any:
    from batchinfer.quantization.methods.bitsandbytes.vllm import (
        Bits4LinearMethod,
        BitsAndBytesConfig,
    )

    return Bits4LinearMethod(BitsAndBytesConfig(quant_type, is_checkpoint=is_checkpoint))


def test_a_bitsandbytes_checkpoint_with_nested_scales_is_held_in_its_own_values() -> None:
    import torch

    torch.manual_seed(0)
    whole = from_checkpoint("bnb-nf4-nested", torch.randn(128, 256))
    assert torch.equal(held(bits4(is_checkpoint=True), whole), whole)


@pytest.mark.parametrize(
    ("kind", "said", "weight_format", "words"),
    [
        (
            "bnb-nf4",
            "fp4",
            0,
            "layer.weight is stored as nf4 .*, config.json says fp4",
        ),
        ("bnb-nf4", "int8", 0, "stored as nf4 .* says int8"),
        ("bnb-int8", "nf4", 0, "stored as int8 .* says nf4"),
        ("bnb-int8", "int8", 2, r"stored in tiles \(weight_format 2\)"),
    ],
)
def test_packed_weights_that_contradict_config_json_are_not_read_as_others(
    kind: str, said: str, weight_format: int, words: str
) -> None:
    import torch

    from batchinfer.quantization.methods.bitsandbytes.dequantize import dequantized
    from tests.support.checkpoints import KINDS

    pieces = KINDS[kind].pack(torch.randn(128, 64))
    if "weight_format" in pieces:
        pieces["weight_format"] += weight_format
    with pytest.raises(ValueError, match=words):
        list(dequantized(((f"layer.{name}", piece) for name, piece in pieces.items()), said))


def test_a_layer_of_one_input_beside_packed_weights_is_as_it_is_stored() -> None:
    import torch

    from batchinfer.quantization.methods.bitsandbytes.dequantize import dequantized

    weight = torch.randn(64, 1).bfloat16()
    ((name, found),) = dequantized([("gate.weight", weight)], "nf4")
    assert name == "gate.weight" and torch.equal(found, weight)


@pytest.mark.parametrize("num_in", [1024, 608, 600])  # of blocks of 64: whole, by 16, by 8
def test_four_bits_cost_the_same_whether_or_not_a_row_is_whole_blocks(num_in: int) -> None:
    import torch

    torch.manual_seed(0)
    weight = torch.randn(96, num_in)
    assert 0.08 < (held(bits4(is_checkpoint=False), weight) - weight).norm() / weight.norm() < 0.1
    for kind in ("bnb-nf4", "bnb-nf4-nested", "bnb-nf4-bf16", "bnb-fp4"):
        whole = from_checkpoint(kind, weight)
        assert 0.08 < (whole - weight).norm() / weight.norm() < 0.13
        method = bits4(kind.removeprefix("bnb-").partition("-")[0], is_checkpoint=True)
        assert torch.equal(held(method, whole), whole)


@pytest.mark.parametrize(
    ("prefix", "is_skipped"),
    [
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1", True),
        ("language_model.model.layers.3.mlp.gate_up_proj", True),
        ("language_model.model.layers.3.self_attn.qkv_proj", False),
        ("language_model.model.layers.30.mlp.gate_up_proj", False),
        ("language_model.model.layers.5.self_attn.qkv_proj", True),
        ("multi_modal_projector.linear_1", True),
        ("language_model.lm_head", True),
    ],
)
def test_what_a_bitsandbytes_checkpoint_skips_is_found_by_vllms_names(
    prefix: str, is_skipped: bool
) -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    from batchinfer.quantization.methods.bitsandbytes.vllm import BitsAndBytesConfig

    # Those of vLLM's Gemma3ForConditionalGeneration.
    prefixes = {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    }
    skipped = [
        "model.vision_tower",
        "multi_modal_projector",
        "lm_head",
        "model.language_model.layers.3.mlp",
        "model.language_model.layers.5.self_attn.k_proj",
    ]
    config = BitsAndBytesConfig.from_config(
        {"load_in_4bit": True, "llm_int8_skip_modules": skipped}
    )
    config.packed_modules_mapping["qkv_proj"] = ["q_proj", "k_proj", "v_proj"]
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix=prefixes))
    assert config._is_skipped(prefix) is is_skipped


def test_a_bitsandbytes_layer_that_two_devices_share_is_what_one_would_hold() -> None:
    done = run_python("-m", "tests.support.shards")
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    rounded = {name: found.pop(name) for name in list(found) if name.startswith("None")}
    assert len(rounded) == 4 and all(0.1 < largest < 0.6 for largest in rounded.values())
    cut = [found.pop(f"{kind} 192 row") for kind in ("bnb-nf4", "bnb-fp4")]
    assert all("64 x 192 weights would be cut within the checkpoint's" in error for error in cut)
    assert len(found) == 10 and set(found.values()) == {0.0}


@pytest.mark.parametrize(
    ("free_gib", "changes", "error", "kind", "words"),
    [
        (10, {}, Exception("WorkerProc failed"), ConfigError, "What would fit: .*_size 4"),
        (40, {}, Exception("WorkerProc failed"), EngineDied, "did not start: WorkerProc failed"),
        (10, {"pipeline_parallel_size": 2}, Exception("x"), EngineDied, "did not start"),
        (10, {}, ValueError("no such backend"), ConfigError, "these settings: no such backend"),
        (40, {}, MemoryError(), ConfigError, "does not fit the device's memory: it needs about"),
    ],
)
def test_a_start_that_fails_for_no_reason_where_memory_is_short_is_the_jobs(
    free_gib: float, changes: dict[str, Any], error: Exception, kind: type, words: str
) -> None:
    needs = read_model(MODEL).needs
    assert needs is not None
    needs = dataclasses.replace(needs, weights=30 * GIB)
    settings = dataclasses.replace(
        SETTINGS, tensor_parallel_size=2, needs=needs, max_model_len=8192, **changes
    )
    arguments = {"model": "m", "max_num_seqs": 256, "max_num_batched_tokens": 8192}
    memory = Memory(total_bytes=int(free_gib * GIB), free_bytes=int(free_gib * GIB))
    found = construction_error(error, arguments, settings, memory)
    assert type(found) is kind and re.search(words, str(found))


def test_layers_of_all_pipeline_stages_are_counted_once_each() -> None:
    def report(
        stage: int, num_layers: int, kernel: str, device_bytes: int | None
    ) -> dict[str, Any]:
        return {
            "stage": stage,
            "num_quantized_layers": num_layers,
            "num_layers": num_layers + 1,
            "methods": {"A": num_layers, "Unquantized": 1},
            "kernels": {kernel: num_layers},
            "weights_bytes": 10 * num_layers,
            "device_bytes": device_bytes,
        }

    first, last = report(0, 8, "KernelA", 70), report(1, 4, "KernelB", 50)
    whole = {
        "num_quantized_layers": 12,
        "num_layers": 14,
        "methods": {"A": 12, "Unquantized": 2},
        "kernels": {"KernelA": 8, "KernelB": 4},
        "weights_bytes": 120,
        "device_bytes": 120,
    }
    assert whole_model([first, first, last, last]) == whole
    one = whole_model([report(0, 3, "KernelA", None)] * 2)
    assert (one["num_layers"], one["device_bytes"]) == (4, None)


# Engines of their own come before the shared one: vLLM allows one at a time in a process.


def test_dummy_weights_run_without_a_tokenizer_and_close_frees_the_process() -> None:
    from batchinfer.engine.vllm.engine import build_vllm_engine

    options = {"load_format": "dummy", "skip_tokenizer_init": True}
    settings = dataclasses.replace(
        with_sampling(max_tokens=5, ignore_eos=True), options=options, max_num_seqs=7
    )
    engine = build_vllm_engine(settings)
    for key in range(10):
        engine.add(CompletionRequest(key, PROMPTS[0]))
    engine.step()
    assert engine.num_running == 7  # three wait
    completion = run(engine, num_before=10)[1]
    assert (completion.finish_reason, len(completion.token_ids)) == ("length", 5)
    # The last token of a completion is read by no step.
    assert engine.num_tokens_computed == 10 * (len(PROMPTS[0]) + 4)
    assert engine.facts.extra["sizes"].startswith(
        "max_num_seqs 7 (the job's); max_num_batched_tokens 4096 (vLLM's default on this hardware)"
    )
    assert engine.facts.max_num_seqs == 7
    assert engine.facts.max_num_batched_tokens == 4096
    assert (engine.facts.dtype, engine.facts.device) == ("float32", "cpu")
    assert engine.facts.kv_cache_tokens is not None and engine.facts.kv_cache_tokens >= 7 * 256
    engine.close()
    engine.close()
    with pytest.raises(EngineDied):
        engine.step()
    with pytest.raises(EngineDied):
        engine.add(CompletionRequest(2, PROMPTS[0]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization": "awq"}, "awq"),
        (
            {"quantization": "experts_int8", "dtype": "bfloat16"},  # of a model without experts
            "experts_int8 and quantized none of the model's 24 layers",
        ),
        ({"max_model_len": 5000}, "5000"),
        ({"options": {"block_size": 16}}, "block size"),
    ],
)
def test_what_vllm_refuses_to_build_is_a_config_error(changes: dict[str, Any], words: str) -> None:
    from batchinfer.engine.vllm.engine import build_vllm_engine

    with pytest.raises(ConfigError, match=words) as caught:
        build_vllm_engine(dataclasses.replace(SETTINGS, **changes))
    assert "\n" not in str(caught.value)


def test_files_that_do_not_fit_together_never_pass_by_starting_again(tmp_path: Path) -> None:
    from batchinfer.engine.vllm.engine import build_vllm_engine
    from tests.support.checkpoints import KINDS, write_checkpoint

    def refused(folder: Path) -> str:
        settings = dataclasses.replace(SETTINGS, model_path=str(folder), dtype="bfloat16")
        with pytest.raises(ConfigError) as caught:
            build_vllm_engine(settings)
        return str(caught.value)

    for kind, other, words in (
        ("awq", "gptq", r"AssertionError \(.*/vllm/.*\.py:\d+\)"),
        ("gptq", "awq", r"RuntimeError: start \(0\) \+ length .* \(.*/vllm/.*\.py:\d+\)"),
    ):
        folder = write_checkpoint(kind, tmp_path / kind)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = dict(KINDS[other].settings)
        (folder / "config.json").write_text(json.dumps(config))
        assert re.search(words, refused(folder))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"garbage")
    assert "UnpicklingError" in refused(folder)


@pytest.mark.parametrize(
    ("error", "may_pass"),
    [
        (AssertionError(), False),
        (KeyError("layers.0.mlp.weight"), False),
        (ValueError("wrong"), False),
        (OSError("no file named model.safetensors"), False),
        (OSError(errno.ENOSPC, "no space left"), True),
        (OSError(errno.ENOMEM, "cannot allocate memory"), True),
        (TimeoutError("no answer"), True),
        (Exception("WorkerProc initialization failed"), True),
        (RuntimeError("the driver does not answer"), True),
    ],
)
def test_only_what_is_outside_of_job_and_model_may_pass(error: Exception, may_pass: bool) -> None:
    found = raised_while_starting(error)
    assert isinstance(found, EngineDied if may_pass else ConfigError)
    assert (str(error) or "AssertionError") in str(found)


def test_a_lost_device_may_pass_also_where_a_compiler_met_it() -> None:
    import torch
    from torch import distributed
    from torch._inductor import exc

    for outside in (torch.AcceleratorError("CUDA error"), distributed.DistBackendError("NCCL")):
        assert isinstance(raised_while_starting(outside), EngineDied)
        wrapped = exc.InvalidCxxCompiler()
        wrapped.__cause__ = outside
        assert isinstance(raised_while_starting(wrapped), EngineDied)
    found = raised_while_starting(exc.InvalidCxxCompiler())
    assert isinstance(found, ConfigError)
    assert "InvalidCxxCompiler" in str(found)


def raised_while_starting(error: Exception) -> Exception:
    from batchinfer.engine.vllm.errors import construction_error

    arguments = {"model": MODEL, "max_num_seqs": 8, "max_num_batched_tokens": 512}
    try:
        raise error
    except Exception as caught:
        return construction_error(caught, arguments, SETTINGS, None)


def test_a_kv_cache_that_is_too_small_is_answered_with_the_length_that_fits() -> None:
    from batchinfer.engine.vllm.engine import build_vllm_engine

    needs = read_model(MODEL, dtype="float32").needs
    options = {"kv_cache_memory_bytes": 128 * 13 * 6144}  # 13 blocks, in float32
    settings = dataclasses.replace(SETTINGS, needs=needs, options=options, max_model_len=2048)
    with pytest.raises(ConfigError, match=r"What would fit: model\.max_model_len 1536") as caught:
        build_vllm_engine(settings)
    assert "26.5 MiB for weights" in str(caught.value)
    build_vllm_engine(dataclasses.replace(settings, max_model_len=1536)).close()


def test_the_sizes_of_an_estimate_are_those_of_vllm() -> None:
    assert auto_sizes([], is_cpu=True) == default_sizes(1)


def test_graphs_are_captured_of_as_many_sequences_as_may_run() -> None:
    assert graph_sizes(SETTINGS, 1024) == 1024
    assert graph_sizes(SETTINGS, 600) == 600
    assert graph_sizes(SETTINGS, 4096) == 1024  # a graph of more saves nothing


def test_what_vllm_captures_by_itself_and_what_the_job_says_of_graphs_stays() -> None:
    assert graph_sizes(SETTINGS, 512) is None
    """A key of compilation_config that says nothing of them leaves ours."""
    sizes = {"compilation_config": {"cudagraph_capture_sizes": [8]}}
    for options in ({"enforce_eager": None}, {"cudagraph_capture_sizes": None}, sizes):
        assert graph_sizes(dataclasses.replace(SETTINGS, options=options), 1024) is None
    other = {"compilation_config": {"cache_dir": "/tmp/compiled"}}
    assert graph_sizes(dataclasses.replace(SETTINGS, options=other), 1024) == 1024


@pytest.mark.parametrize(
    ("given", "backend"),
    [
        (None, "xgrammar"),
        ({"disable_any_whitespace": True}, "xgrammar"),
        ({"backend": "auto"}, "xgrammar"),
        ({"backend": "guidance"}, "guidance"),
    ],
)
def test_rows_with_forms_of_their_own_have_one_compiler(
    given: dict[str, Any] | None, backend: str
) -> None:
    """Left to vLLM, the first of them would choose it for all, so results were those of an order.
    A job with one form leaves it to vLLM.
    """
    options = {} if given is None else {"structured_outputs_config": given}
    rows = with_sampling(per_row=PerRowSettings(regex="form"))
    arguments = engine_arguments(dataclasses.replace(rows, options=options))
    config = arguments["structured_outputs_config"]
    is_compact = bool(given and given.get("disable_any_whitespace"))
    assert (config.backend, config.disable_any_whitespace) == (backend, is_compact)
    if is_compact:  # vLLM refuses it without a backend
        return
    of_job = dataclasses.replace(with_sampling(**structured(regex="a")), options=options)
    alone = engine_arguments(of_job).get("structured_outputs_config")
    assert (alone and alone.backend) == (given and given.get("backend", "auto"))


def test_mappings_that_vllm_writes_into_go_with_a_reasoning_parser() -> None:
    """It takes them for its own objects there, and has to get them as such."""
    from vllm.engine.arg_utils import EngineArgs

    ends = {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}
    thinking = with_sampling(per_row=PerRowSettings(regex="form"), reasoning_parser="qwen3")
    settings = dataclasses.replace(thinking, options={"reasoning_config": ends})
    config = EngineArgs(**engine_arguments(settings)).create_engine_config()
    assert config.structured_outputs_config.reasoning_parser == "qwen3"
    assert config.structured_outputs_config.backend == "xgrammar"
    assert config.reasoning_config.reasoning_end_str == "</think>"
    options = {"structured_outputs_config": {"backend": "none"}}
    with pytest.raises(ConfigError, match=r"engine\.options\.structured_outputs_config: .*none"):
        engine_arguments(dataclasses.replace(thinking, options=options))


def test_a_cpu_captures_no_graphs() -> None:
    many = dataclasses.replace(SETTINGS, max_num_seqs=1024)
    assert "max_cudagraph_capture_size" not in engine_arguments(many)


@pytest.fixture(scope="module")
def core() -> Iterator[Any]:
    """A loaded LLMEngine that fits seeds; each test puts its own sampling on it."""
    from batchinfer.engine.vllm.engine import build_vllm_engine

    engine = build_vllm_engine(
        dataclasses.replace(
            SETTINGS, demand=CompletionDemand("generate", SamplingSettings(seed=0, temperature=1.0))
        )
    )
    yield engine._core
    engine.close()
    gc.collect()


def engine_on(core: Any, settings: VllmSettings) -> Any:

    from batchinfer.engine.vllm.engine import VllmEngine

    return VllmEngine(core, settings.requests, settings)


def test_greedy_completions_read_sensibly_and_end_before_eos(core: Any) -> None:
    engine = engine_on(core, with_sampling(max_tokens=48))
    done = run(engine, *(CompletionRequest(i, p) for i, p in enumerate(PROMPTS)))
    for completion in done.values():
        assert completion.finish_reason == "stop" and completion.stop_reason is None
        assert completion.token_ids.dtype == np.int32
        assert completion.token_ids[-1] == EOS
        assert completion.num_text_tokens == len(completion.token_ids) - 1
        assert completion.text is None and completion.token_logprobs is None
        assert len(text_of(completion).split()) >= 2
    assert "Python" in text_of(done[2])


def test_a_row_cut_by_max_tokens_keeps_all_its_tokens_as_text(core: Any) -> None:
    engine = engine_on(core, with_sampling(max_tokens=3))
    completion = run(engine, CompletionRequest(0, PROMPTS[0]))[0]
    assert completion.finish_reason == "length" and completion.stop_reason is None
    assert completion.num_text_tokens == len(completion.token_ids) == 3


def test_logprobs_come_flat_with_the_sampled_token_apart_from_the_top_k(core: Any) -> None:
    completion = run(engine_on(core, SETTINGS), CompletionRequest(0, PROMPTS[0]))[0]
    num_tokens = len(completion.token_ids)
    assert completion.token_logprobs is not None and completion.top_logprobs is not None
    assert completion.top_token_ids is not None and completion.top_offsets is not None
    assert completion.token_logprobs.shape == (num_tokens,)
    assert completion.token_logprobs.dtype == np.float32 and (completion.token_logprobs <= 0).all()
    assert completion.top_offsets.tolist() == list(range(0, 2 * num_tokens + 1, 2))
    top_ids = completion.top_token_ids.reshape(num_tokens, 2)
    top = completion.top_logprobs.reshape(num_tokens, 2)
    assert (top_ids[:, 0] == completion.token_ids).all()  # greedy: the likeliest was taken
    assert (top[:, 0] == completion.token_logprobs).all() and (top[:, 0] >= top[:, 1]).all()
    assert (np.exp(top).sum(axis=1) <= 1.0001).all()


def test_a_streamed_request_shows_each_token_as_it_comes(core: Any) -> None:
    """Beside one that is not streamed; the end is that of any request."""
    engine = engine_on(core, SETTINGS)
    engine.add(CompletionRequest(0, PROMPTS[0], is_streamed=True))
    engine.add(CompletionRequest(1, PROMPTS[1]))
    seen: list[Completion] = []
    done: dict[int, Completion] = {}
    while len(done) < 2:
        done |= {completion.key: completion for completion in engine.step()}
        if 0 not in done:
            seen.append(engine.so_far(0))
    whole = run(engine, CompletionRequest(2, PROMPTS[0]))[2]
    assert done[0].token_ids.tolist() == whole.token_ids.tolist()
    assert done[0].finish_reason == whole.finish_reason
    assert [len(s.token_ids) for s in seen] == list(range(1, len(whole.token_ids)))
    assert whole.token_logprobs is not None
    for partial in seen:
        size = len(partial.token_ids)
        assert partial.token_ids.tolist() == whole.token_ids[:size].tolist()
        assert partial.token_logprobs.tolist() == whole.token_logprobs[:size].tolist()
        assert partial.finish_reason is None


def test_an_aborted_request_is_heard_of_no_more(core: Any) -> None:
    engine = engine_on(core, SETTINGS)
    engine.add(CompletionRequest(0, PROMPTS[0], is_streamed=True))
    engine.step()
    engine.abort(0)
    assert engine.num_tokens_in_flight() == 0
    assert list(run(engine, CompletionRequest(1, PROMPTS[1]))) == [1]


def test_other_sampling_needs_no_other_engine(core: Any) -> None:
    """What is refused changes nothing."""
    engine = engine_on(core, SETTINGS)
    engine.set_demand(CompletionDemand("generate", SamplingSettings(max_tokens=3, logprobs=0)))
    completion = run(engine, CompletionRequest(0, PROMPTS[0]))[0]
    assert (len(completion.token_ids), completion.top_logprobs) == (3, None)
    sampling = SamplingSettings().model_copy(update=structured(regex="(unclosed"))
    with pytest.raises(ConfigError, match="refuses the sampling settings"):
        engine.set_demand(CompletionDemand("generate", sampling))
    assert len(run(engine, CompletionRequest(1, PROMPTS[0]))[1].token_ids) == 3


def test_token_logprobs_sum_to_what_vllm_calls_cumulative(core: Any) -> None:
    from batchinfer.engine.vllm.demands.completion import shared_params
    from batchinfer.engine.vllm.output import completion_of

    core.add_request("7", {"prompt_token_ids": PROMPTS[1].tolist()}, shared_params(SCORED))
    outputs: list[Any] = []
    while not outputs:
        outputs = core.step()
    completion = completion_of(outputs[0], has_text=False)
    assert completion.token_logprobs is not None
    cumulative = outputs[0].outputs[0].cumulative_logprob
    assert completion.token_logprobs.sum() == pytest.approx(cumulative, rel=1e-5)


def test_logprobs_zero_gives_the_sampled_tokens_only(core: Any) -> None:
    completion = run(
        engine_on(core, with_sampling(max_tokens=4, logprobs=0)), CompletionRequest(0, PROMPTS[0])
    )
    assert completion[0].token_logprobs is not None and completion[0].top_logprobs is None
    assert completion[0].prompt_token_logprobs is None


def test_prompt_logprobs_have_one_value_a_token_and_none_for_the_first(core: Any) -> None:
    engine = engine_on(core, SETTINGS)
    for _ in range(2):  # the second time the prompt is in the prefix cache
        scores = run(engine, CompletionRequest(0, PROMPTS[0]))[0].prompt_token_logprobs
        assert scores is not None and scores.shape == PROMPTS[0].shape
        assert np.isnan(scores[0]) and (scores[1:] <= 0).all()


def test_a_seed_fixes_a_row_whatever_runs_beside_it_and_in_which_order(core: Any) -> None:
    settings = with_sampling(max_tokens=16, temperature=1.0, seed=0)
    requests = [CompletionRequest(i, PROMPTS[i % 3], seed=(1 << 62) + i) for i in range(6)]
    first = run(engine_on(core, settings), *requests)
    alone = run(engine_on(core, settings), requests[4])
    backwards = run(engine_on(core, settings), *reversed(requests))
    assert alone[4].token_ids.tolist() == first[4].token_ids.tolist()
    for key, completion in first.items():
        assert backwards[key].token_ids.tolist() == completion.token_ids.tolist()
    assert first[0].token_ids.tolist() != first[3].token_ids.tolist()  # same prompt, other seed


def test_a_stop_string_ends_the_row_and_stays_out_of_the_text(core: Any) -> None:
    plain = text_of(
        run(engine_on(core, with_sampling(max_tokens=48)), CompletionRequest(0, PROMPTS[2]))[0]
    )
    stop = plain.split()[1]
    settings = with_sampling(max_tokens=48, stop=(stop,))
    completion = run(engine_on(core, settings), CompletionRequest(0, PROMPTS[2]))[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.text is not None and completion.text == plain[: plain.index(stop)]
    assert completion.num_text_tokens == len(completion.token_ids)


def test_a_stop_token_is_named_and_is_not_text(core: Any) -> None:
    plain = run(engine_on(core, with_sampling(max_tokens=48)), CompletionRequest(0, PROMPTS[2]))[0]
    stop_id = int(plain.token_ids[2])
    settings = with_sampling(max_tokens=48, stop_token_ids=(stop_id,))
    completion = run(engine_on(core, settings), CompletionRequest(0, PROMPTS[2]))[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", str(stop_id))
    assert completion.token_ids[-1] == stop_id
    assert completion.num_text_tokens == len(completion.token_ids) - 1


def test_a_choice_is_one_of_the_choices(core: Any) -> None:
    settings = with_sampling(max_tokens=12, **structured(choice=("library", "program")))
    engine = engine_on(core, settings)
    engine.check_requests()
    done = run(engine, *(CompletionRequest(i, p) for i, p in enumerate(PROMPTS)))
    assert {text_of(c) for c in done.values()} <= {"library", "program"}


OWN: list[dict[str, Any]] = [
    {"max_tokens": 5, "logprobs": 2},
    {"max_tokens": 20, "temperature": 1.0},  # with the seed of its request
    {"max_tokens": 12, "structured": {"choice": ["library", "program"]}},
    {"max_tokens": 48, "stop": ["Python"]},
    {"max_tokens": 8, "ignore_eos": True, "logprobs": 0},
]
PER_ROW = {name: name for name in ("max_tokens", "temperature", "stop", "choice", "seed")}


GREEDY = {"max_tokens": 16, "temperature": 0.0, "logprobs": 1}


def test_a_width_holds_and_changes_no_result(core: Any) -> None:
    engine = engine_on(core, with_sampling(**GREEDY))
    requests = [CompletionRequest(i, PROMPTS[i % 3][i // 3 :]) for i in range(15)]
    expected = run(engine, *requests)
    assert engine.set_width(3)
    try:
        done: dict[int, Completion] = {}
        for request in requests:
            engine.add(request)
        while len(done) < 6:
            done |= {c.key: c for c in engine.step()}
            assert 1 <= engine.num_running <= 3
        assert engine.set_width(8)
        num_running = []
        while len(done) < len(requests):
            done |= {c.key: c for c in engine.step()}
            num_running.append(engine.num_running)
        assert 3 < max(num_running) <= 8
    finally:
        engine.set_width(engine.facts.max_num_seqs)
    for key, completion in expected.items():
        assert np.array_equal(done[key].token_ids, completion.token_ids)
        assert np.array_equal(done[key].token_logprobs, completion.token_logprobs)


def test_an_engine_core_in_another_process_is_not_narrowed(core: Any) -> None:
    engine = engine_on(core, with_sampling(**GREEDY))
    engine._scheduler = None
    assert not engine.set_width(3)


def test_a_scheduler_of_vllm_0_26_is_not_narrowed(core: Any) -> None:
    class Scheduler:
        max_num_running_reqs = 256

    engine = engine_on(core, with_sampling(**GREEDY))
    engine._scheduler = Scheduler()
    assert not engine.set_width(3)
    assert Scheduler.max_num_running_reqs == 256


def test_a_tuned_run_has_the_tokens_of_one_that_is_not(
    core: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clock says that steps of 16 take four times as long as those of 8, so 8 is found."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prompts = [PROMPTS[i % 3][: 20 + i % 11] for i in range(240)]
    plain, _ = tuned_tokens(core, prompts, is_tuned=False)
    tuned, reports = tuned_tokens(core, prompts, is_tuned=True)
    assert [report.by for report in reports] == ["searching", "search"]
    assert reports[-1].width == 8, reports
    assert "8 sequences at once are" in reports[-1].text
    assert tuned == plain


def tuned_tokens(
    core: Any, prompts: list[np.ndarray], *, is_tuned: bool
) -> tuple[dict[int, list[int]], list[WidthReport]]:
    """Token ids by row, and what was told of the width."""
    engine = engine_on(core, with_sampling(**GREEDY))
    engine.facts = dataclasses.replace(engine.facts, max_num_seqs=16)
    clock, step = SteppedClock(), engine.step

    def timed_step() -> Any:
        answers = step()
        clock.now_ns += int(2e6 * engine.num_running**2)
        return answers

    engine.step = timed_step
    ready = ReadyWork(order="input", max_tokens=1 << 20)
    ready.put(Chunk.of_prompts(prompts, num_samples=1))
    ready.close()
    results: list[Result] = []
    counters, reports = Counters(clock), list[WidthReport]()
    counters.set_total(len(prompts), 1)
    job = Job.model_validate(job_settings(Place("nowhere"), sampling=GREEDY))
    loop = Loop(engine, ready, results.extend, counters, job=job, should_stop=lambda: False)
    if is_tuned:
        memory = WidthMemory({"max_num_seqs": 16})
        loop.set_width(TunedWidth(engine, memory, counters, reports.append, budget_s=30.0))
    try:
        loop.run()
    finally:
        engine.set_width(256)
    tokens = {int(r.chunk.rows[r.index]): r.answer.token_ids.tolist() for r in results}  # type: ignore[attr-defined]
    return tokens, reports


def test_requests_that_are_sampled_in_their_own_ways_share_steps(core: Any) -> None:
    """Each gets what it gets in an engine whose job says so."""
    ways = [SamplingSettings.model_validate({"seed": 0} | own) for own in OWN]
    seeds = [9 if way.uses_seeds else None for way in ways]
    mixed = engine_on(core, with_sampling(per_row=PerRowSettings(**PER_ROW)))
    mixed.check_requests()
    done = run(
        mixed,
        *(
            CompletionRequest(key, PROMPTS[2], seeds[key], sampling=way)
            for key, way in enumerate(ways)
        ),
    )
    for key, way in enumerate(ways):
        settings = dataclasses.replace(SETTINGS, demand=CompletionDemand("generate", way))
        alone = run(engine_on(core, settings), CompletionRequest(key, PROMPTS[2], seeds[key]))[key]
        found = done[key]
        assert found.token_ids.tolist() == alone.token_ids.tolist()
        assert (found.finish_reason, found.stop_reason) == (alone.finish_reason, alone.stop_reason)
        assert found.text == (alone.text if way.stop else text_of(alone))
        assert np.array_equal(found.top_token_ids, alone.top_token_ids)
    assert done[3].stop_reason == "Python" and text_of(done[2]) in ("library", "program")


@pytest.mark.parametrize(
    "own",
    [
        structured(grammar="root ::= oops("),
        structured(regex="(unclosed"),
        structured(json_schema={"type": "string", "pattern": "(?<=a)b"}),
    ],
)
def test_a_way_of_sampling_that_vllm_refuses_is_an_error_of_its_row(
    core: Any, own: dict[str, Any]
) -> None:
    engine = engine_on(core, with_sampling(max_tokens=2, per_row=PerRowSettings(**PER_ROW)))
    engine.add(CompletionRequest(0, PROMPTS[0]))
    refused = SamplingSettings().model_copy(update=own)
    with pytest.raises(RowError) as caught:
        engine.add(CompletionRequest(1, PROMPTS[0], sampling=refused))
    assert caught.value.kind == "engine_rejected" and caught.value.message
    assert run(engine, CompletionRequest(2, PROMPTS[1]), num_before=1).keys() == {0, 2}


@pytest.mark.parametrize(
    "changes",
    [
        structured(json_schema={"type": "nonsense"}),
        structured(regex="(unclosed"),
        structured(grammar="root ::= oops("),
        structured(choice=()),
        {"temperature": 3.0},
    ],
)
def test_sampling_that_every_row_would_fail_with_fails_the_job(
    core: Any, changes: dict[str, Any]
) -> None:
    settings = with_sampling(max_tokens=8, **changes)
    with pytest.raises(ConfigError, match="vLLM refuses the sampling settings"):
        engine_on(core, settings).check_requests()
    assert not core.has_unfinished_requests()


@pytest.mark.parametrize("token_ids", [[5000], [], [5] * 256, [5] * 300])
def test_a_refused_request_is_that_rows_error_and_the_engine_continues(
    core: Any, token_ids: list[int]
) -> None:
    engine = engine_on(core, with_sampling(max_tokens=2))
    engine.add(CompletionRequest(0, PROMPTS[0]))
    with pytest.raises(RowError) as caught:
        engine.add(CompletionRequest(1, np.array(token_ids, np.int32)))
    assert caught.value.kind == "engine_rejected" and caught.value.message
    assert run(engine, CompletionRequest(2, PROMPTS[1]), num_before=1).keys() == {0, 2}


def test_timing_is_filled_and_adds_up(core: Any) -> None:
    timing = run(engine_on(core, with_sampling(max_tokens=8)), CompletionRequest(0, PROMPTS[0]))[
        0
    ].timing
    assert timing.queued_s is not None and timing.prefill_s is not None
    assert timing.decode_s is not None and timing.total_s is not None
    assert timing.prefill_s > 0 and timing.decode_s > 0
    parts = timing.queued_s + timing.prefill_s + timing.decode_s
    assert timing.total_s == pytest.approx(parts)


def test_seeds_on_a_cpu_read_prompts_whole() -> None:
    seeded = with_sampling(max_tokens=8, temperature=1.0, seed=0)
    arguments = engine_arguments(dataclasses.replace(seeded, max_model_len=9000))
    assert arguments["enable_chunked_prefill"] is False
    assert arguments["max_num_batched_tokens"] == 9000
    with pytest.raises(ConfigError, match="enable_chunked_prefill"):
        engine_arguments(dataclasses.replace(seeded, options={"enable_chunked_prefill": True}))
    with pytest.raises(ConfigError, match="max_num_batched_tokens is 100"):
        engine_arguments(dataclasses.replace(seeded, max_num_batched_tokens=100))


def test_the_kv_cache_on_a_cpu_is_bounded_and_holds_a_sequence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    sequence_bytes = (256 + 128) * SETTINGS.kv_bytes_per_token
    one = dataclasses.replace(SETTINGS, max_num_seqs=1)
    assert engine_arguments(one)["kv_cache_memory_bytes"] == sequence_bytes
    huge = dataclasses.replace(SETTINGS, kv_bytes_per_token=1 << 40)
    assert engine_arguments(huge)["kv_cache_memory_bytes"] == (256 + 128) << 40
    many = engine_arguments(dataclasses.replace(SETTINGS, weights_bytes=1 << 60, max_num_seqs=9**9))
    assert sequence_bytes < many["kv_cache_memory_bytes"] < available_memory_bytes()
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert "kv_cache_memory_bytes" not in engine_arguments(SETTINGS)


def test_a_machine_without_a_gpu_is_described_as_its_cpu() -> None:
    [line] = describe_devices()
    assert line.startswith("cpu, ") and "GiB" in line


def test_the_environment_keeps_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "")  # so that monkeypatch puts back what was there
        monkeypatch.delenv(name)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    prepare_environment(weights_bytes=10**10, is_local_model=False)
    assert os.environ["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    assert "HF_HUB_OFFLINE" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    prepare_environment(weights_bytes=1, is_local_model=True)
    assert os.environ["OMP_NUM_THREADS"] == "3" and os.environ["HF_HUB_OFFLINE"] == "1"


def test_the_worker_plugin_leaves_processes_outside_our_engines_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from batchinfer.engine.vllm.plugin import register

    before = signal.getsignal(signal.SIGTERM)
    register()
    monkeypatch.setenv(OWNER_PID_VARIABLE, str(os.getpid()))  # the owner itself
    register()
    assert signal.getsignal(signal.SIGTERM) == before


def test_only_an_engine_with_bitsandbytes_imports_what_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from batchinfer.engine.vllm.plugin import register
    from batchinfer.quantization.methods import plugins

    monkeypatch.setenv(OWNER_PID_VARIABLE, str(os.getpid()))
    [plugin] = plugins("batchinfer_bitsandbytes")
    monkeypatch.setitem(sys.modules, plugin.module, None)  # is broken
    register()
    monkeypatch.setenv(PLUGINS_VARIABLE, plugin.module)
    with pytest.raises(ImportError):
        register()


def test_what_the_system_lacks_is_not_a_reason_to_start_again() -> None:
    from torch import distributed

    error = distributed.DistStoreError(f"flock: {os.strerror(errno.ENOSYS)}")
    told = raised_while_starting(error)
    assert isinstance(told, ConfigError) and "Function not implemented" in str(told)


FAILED_CALL_SCRIPT = """
import logging, time
from batchinfer.engine.vllm.plugin import WORKER_LOGGER, EndWithFailedCall
logger = logging.getLogger(WORKER_LOGGER)
logger.addHandler(EndWithFailedCall())
logger.error("something else")
time.sleep(3)
print("lives", flush=True)
try:
    raise MemoryError
except MemoryError:
    logger.exception("WorkerProc hit an exception.")
time.sleep(60)
print("hangs", flush=True)
"""


def test_a_worker_whose_call_failed_ends_instead_of_keeping_the_others_waiting() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FAILED_CALL_SCRIPT],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (1, "lives\n"), ended.stderr
    vllm = importlib.util.find_spec(vllm_plugin.WORKER_LOGGER)
    assert vllm is not None and vllm.origin is not None
    assert f'.exception("{vllm_plugin.FAILED_CALL}' in Path(vllm.origin).read_text()


WORKER_SCRIPT = """
import multiprocessing, os, signal, sys, time
from batchinfer.engine.vllm.setup import prepare_environment
from tests.engine.vllm.test_engine import PROMPTS, with_sampling

def main():
    import dataclasses
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = sys.argv[2]
    prepare_environment(weights_bytes=0, is_local_model=True)
    sys.path.append(sys.argv[3])  # where workers find the plugin
    from batchinfer.engine.demands.completion import CompletionRequest
    from batchinfer.engine.vllm.engine import build_vllm_engine
    from batchinfer.errors import EngineDied
    from batchinfer.signals import STOP_CODES
    settings = with_sampling(max_tokens=150, ignore_eos=True)
    if sys.argv[1] == "mp":  # and the worker has to know our own quantization
        settings = dataclasses.replace(settings, quantization="batchinfer_bitsandbytes")
    in_processes = {"distributed_executor_backend": sys.argv[1]}
    engine = build_vllm_engine(dataclasses.replace(settings, options=in_processes))
    [worker] = multiprocessing.active_children()
    for key in range(8):
        engine.add(CompletionRequest(key, PROMPTS[0]))
    engine.step()
    for number in STOP_CODES:
        os.kill(worker.pid, number)
    for _ in range(10):
        engine.step()
    assert worker.is_alive(), "the worker obeyed a scheduler's signal"
    os.kill(worker.pid, signal.SIGKILL)
    killed = time.monotonic()
    try:
        for _ in range(1000):
            engine.step()
    except EngineDied as error:
        engine.close()
        print("DIED", time.monotonic() - killed, error, flush=True)

if __name__ == "__main__":
    main()
"""


@pytest.mark.timeout(600)  # two engines with processes of their own
def test_engine_processes_ignore_signals_and_their_death_ends_the_engine(tmp_path: Path) -> None:
    entry_point = tmp_path / "worker_plugin-0.dist-info"  # as the installed package has it
    entry_point.mkdir()
    (entry_point / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: worker-plugin\nVersion: 0\n"
    )
    (entry_point / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nbatchinfer = batchinfer.engine.vllm.plugin:register\n"
    )
    script = tmp_path / "script.py"
    script.write_text(WORKER_SCRIPT)
    for backend, has_core_process in (("mp", "0"), ("uni", "1")):
        arguments = (str(script), backend, has_core_process, str(tmp_path))
        ended = run_python(*arguments, spares=(1,), timeout_s=280)
        [line] = [x for x in ended.stdout.splitlines() if x.startswith("DIED")] or [
            ended.stderr[-3000:]
        ]
        assert "the vLLM engine died" in line
        assert float(line.split()[1]) < 15
