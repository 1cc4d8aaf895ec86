"""Memory before loading: what is estimated, what would fit, and what a GPU's other users leave."""

from __future__ import annotations

import ctypes
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchinfer.config import Job, SamplingSettings, job_from
from batchinfer.engine import hardware
from batchinfer.engine.demands.completion import CompletionDemand
from batchinfer.engine.hardware import GIB, Gpu, Memory
from batchinfer.engine.kinds import engine_kind
from batchinfer.engine.vllm.fit import advice, auto_sizes, auto_utilization, estimate
from batchinfer.engine.vllm.settings import VllmSettings, vllm_settings
from batchinfer.errors import ConfigError, MemoryHeld
from batchinfer.model import Needs
from batchinfer.model.needs import needs_of
from batchinfer.model.shape import shape_of
from batchinfer.quantization import Checkpoint, Choice, Machine
from batchinfer.runner.factory import engine_spec
from tests.support.headers import Header, change_header, keep_tensors
from tests.support.jobs import MODEL, Place, job, rows, run, write_job
from tests.support.models import read_model

H200 = Machine(
    "cuda", compute_capability=(9, 0), packages=frozenset({"compressed-tensors"}), engine="vllm"
)
#: Of Llama-3.1-8B in bfloat16.
LLAMA_8B = Needs(
    weights=15 * GIB,
    kv_per_token=131_072,
    step_per_token=102_400,
    logits_per_row=128_256 * 22,
    num_heads=32,
    num_kv_shards=8,
    smaller={"fp8": 8 * GIB, "int4": 5 * GIB},
)
SETTINGS = VllmSettings(
    model_path="m",
    tokenizer_path="m",
    dtype="bfloat16",
    max_model_len=8192,
    weights_bytes=15 * GIB,
    kv_bytes_per_token=131_072,
    demand=CompletionDemand("generate", SamplingSettings(max_tokens=16)),
    needs=LLAMA_8B,
)


def test_weights_are_counted_as_they_will_be_once_loaded() -> None:
    tensors = 13_900_288  # of the file's 13.9 MB, less its header
    linear = 6 * 2 * (256 * 512 + 256 * 256 + 3 * 256 * 1024)  # bytes, two for each weight

    def weights(**how: Any) -> int:
        needs = read_model(str(MODEL), machine=H200, **how).needs
        assert needs is not None
        return needs.weights

    assert weights() == tensors
    assert weights(dtype="float32") == 2 * tensors
    assert weights(quantization="fp8") == tensors - linear // 2


def test_what_is_smaller_are_quantizations_that_this_machine_can_run() -> None:
    needs = read_model(str(MODEL), machine=H200).needs
    assert needs is not None
    assert list(needs.smaller) == ["int8", "fp8", "fp4", "int4"]
    assert sorted(needs.smaller.values(), reverse=True) == list(needs.smaller.values())
    quantized = read_model(str(MODEL), machine=H200, quantization="fp8").needs
    assert quantized is not None and list(quantized.smaller) == ["fp4", "int4"]
    in_float32 = read_model(str(MODEL), machine=H200, dtype="float32").needs
    assert in_float32 is not None and not in_float32.smaller  # that are computed in float32


def test_a_step_holds_the_widest_layer_dequantized_where_weights_are_computed_so() -> None:
    gate_and_up = 256 * 2 * 1024
    bnb = Machine("cpu", packages=frozenset({"bitsandbytes"}), engine="vllm")
    for how, num_bytes in (
        ({"quantization": "nf4"}, 2 * gate_and_up),
        ({"quantization": "nf4", "dtype": "float32"}, 4 * gate_and_up),
        ({"quantization": "none"}, 0),
    ):
        needs = read_model(str(MODEL), machine=bnb, **how).needs
        assert needs is not None and needs.dequantized == num_bytes
    shape = shape_of(json.loads((MODEL / "config.json").read_text()))
    of_8_bits = needs_of(
        {},
        shape,
        Checkpoint("bnb-8bit", "bitsandbytes"),
        Choice("nf4", None, "bfloat16"),
        asked_dtype=None,
        kv_per_token=1,
        machine=bnb,
    )
    assert of_8_bits.dequantized == (4 + 2) * gate_and_up
    sizes = {"max_num_seqs": 1, "max_num_batched_tokens": 1}
    without = estimate(LLAMA_8B, **sizes)
    needs = replace(LLAMA_8B, dequantized=1000)
    assert estimate(needs, **sizes).step == without.step + 1000
    assert estimate(needs, **sizes, num_devices=2).step == without.step + 500


def test_padding_of_the_vocabulary_and_an_output_layer_of_its_own_are_counted(
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    file = folder / "model.safetensors"
    keep_tensors(file, lambda name: name != "model.embed_tokens.weight")
    num_bytes = 4000 * 256 * 2

    def change(header: Header) -> None:
        end = max(t["data_offsets"][1] for t in header.values() if "data_offsets" in t)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            offsets = [end, end := end + num_bytes]
            header[name] = {"dtype": "BF16", "shape": [4000, 256], "data_offsets": offsets}

    change_header(file, change)
    with file.open("ab") as stream:
        stream.write(bytes(2 * num_bytes))

    def weights(**changes: Any) -> int:
        config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 4000} | changes
        (folder / "config.json").write_text(json.dumps(config))
        needs = read_model(str(folder)).needs
        assert needs is not None
        return needs.weights

    tied = weights(tie_word_embeddings=True)
    assert tied == 13_900_288 - (4096 - math.ceil(4000 / 64) * 64) * 256 * 2
    assert weights(tie_word_embeddings=False) == tied + math.ceil(4000 / 64) * 64 * 256 * 2


def test_a_step_is_its_widest_layer_or_its_logits_and_several_devices_share_the_rest() -> None:
    one = estimate(LLAMA_8B, max_num_seqs=1, max_num_batched_tokens=1000)
    assert one.step == 1000 * 102_400
    many = estimate(LLAMA_8B, max_num_seqs=1024, max_num_batched_tokens=1000, num_devices=4)
    assert many.step == 1024 * LLAMA_8B.logits_per_row
    assert (many.weights, many.kv_per_token) == (15 * GIB // 4, 32_768)
    assert many.room_for_tokens(3 * GIB) == 0


def test_stages_share_layers_and_the_first_or_last_has_a_vocabulary_besides() -> None:
    of_vocabulary = 128_256 * 4096 * 2
    needs = replace(LLAMA_8B, num_layers=32, at_ends=2 * of_vocabulary, at_one_end=of_vocabulary)
    sizes = {"max_num_seqs": 1, "max_num_batched_tokens": 1000}
    two = estimate(needs, **sizes, num_stages=2)
    of_layers = 15 * GIB - 2 * of_vocabulary
    assert two.weights == of_layers // 2 + of_vocabulary
    assert two.kv_per_token == 131_072 // 2
    three = estimate(needs, **sizes, num_stages=3)  # 11, 11 and 10 layers
    assert three.weights == -(-of_layers * 11 // 32) + of_vocabulary
    both = estimate(needs, **sizes, num_stages=2, num_devices=2)
    assert both.weights == -(-two.weights // 2)
    assert both.kv_per_token == 131_072 // 4


@pytest.mark.parametrize(
    "engine", [{}, {"options": {"pipeline_parallel_size": 3}}], ids=["setting", "option"]
)
def test_stages_are_a_setting_of_the_model_or_vllms_own_argument(
    engine: dict[str, Any], folder: Place
) -> None:
    model = {"pipeline_parallel_size": 3} if not engine else {}
    parsed = job_from(job(folder, model={"path": str(MODEL), **model}, engine=engine))
    settings = vllm_settings(engine_spec(parsed, read_model(str(MODEL))))
    assert (settings.pipeline_parallel_size, settings.num_devices) == (3, 3)


@pytest.mark.parametrize(
    ("shape", "num_devices", "num_bytes"),
    [
        ({}, 2, 6 * 2 * 64 * 2),  # two KV heads of the demo's: one on each device
        ({}, 4, 6 * 2 * 64 * 2),  # and each on two
        ({"num_key_value_heads": 4}, 2, 2 * 6 * 2 * 64 * 2),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, 2, 6 * 576 * 2),
    ],
)
def test_devices_share_kv_heads_and_each_keeps_a_whole_latent_vector(
    shape: dict[str, Any], num_devices: int, num_bytes: int, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text()) | shape
    (folder / "config.json").write_text(json.dumps(config))
    needs = read_model(str(folder)).needs
    assert needs is not None
    found = estimate(needs, max_num_seqs=1, max_num_batched_tokens=1, num_devices=num_devices)
    assert found.kv_per_token == num_bytes


# What would fit.


def said(memory: Memory, **changes: Any) -> str:
    return advice(replace(SETTINGS, **changes), (256, 8192), memory).partition(". ")[2]


@pytest.mark.parametrize(
    ("total", "free", "changes", "words"),
    [
        (24, 23.6, {"max_model_len": 131_072}, "model.max_model_len 3"),
        (24, 23.6, {"max_model_len": 131_072}, "model.tensor_parallel_size 2"),
        (19.5, 19.4, {}, "engine.gpu_memory_utilization 0.94"),
        (16, 15.9, {}, "model.quantization fp8 (8.0 GiB of weights)"),
        (10, 9.9, {}, "model.quantization int4 (5.0 GiB of weights)"),
        (80, 40, {"gpu_memory_utilization": 0.9}, "engine.gpu_memory_utilization auto (now 0.48)"),
        (
            80,
            40,
            {"gpu_memory_utilization": 0.9, "max_model_len": 262_144},
            "What would fit: model.max_model_len 19",
        ),
        (
            80,
            79,
            {"options": {"kv_cache_memory_bytes": 1 << 29}},
            "model.max_model_len 3968, or engine.options.kv_cache_memory_bytes 1090519040",
        ),
        (16, 15.9, {}, "model.cpu_offload_gib 4 (slower)"),
        (16, 15.9, {"cpu_offload_gib": 3.0, "max_model_len": 65_536}, "model.cpu_offload_gib 11 ("),
        (80, 79, {}, "else lower engine.max_num_seqs (now 256)"),
        (80, 0.5, {}, "take a smaller model or a larger device"),
        (2, 1.9, {}, "take a smaller model or a larger device"),
    ],
)
def test_what_would_fit_is_named(
    total: float, free: float, changes: dict[str, Any], words: str
) -> None:
    memory = Memory(int(total * GIB), int(free * GIB))
    assert words in said(memory, **changes)


def test_a_number_of_devices_that_does_not_divide_the_heads_is_not_named() -> None:
    memory = Memory(24 * GIB, int(23.6 * GIB))
    needs = replace(LLAMA_8B, num_heads=28, num_kv_shards=4)
    assert "parallel_size 2" in said(memory, needs=needs, max_model_len=131_072)
    text = said(memory, needs=replace(needs, num_heads=3 * 5), max_model_len=131_072)
    assert "parallel_size" not in text
    latent = replace(LLAMA_8B, num_kv_shards=1)  # whose cache no number of devices divides
    assert "parallel_size" not in said(memory, needs=latent, max_model_len=196_608)
    assert "parallel_size" in said(memory, needs=LLAMA_8B, max_model_len=196_608)


def test_what_is_named_as_fitting_fits() -> None:
    memory = Memory(24 * GIB, int(23.6 * GIB))
    text = said(memory, max_model_len=131_072)
    length = int(text.partition("max_model_len ")[2].partition(",")[0])
    budget = int(0.9 * memory.total_bytes) - GIB
    found = estimate(LLAMA_8B, max_num_seqs=256, max_num_batched_tokens=8192)
    assert 0 <= budget - found.weights - found.step - found.cache_bytes(length) < 128 * 131_072


def test_a_width_that_does_not_fit_is_told_the_largest_that_does() -> None:
    memory = Memory(24 * GIB, int(23.6 * GIB))
    text = advice(SETTINGS, (8192, 8192), memory).partition(". ")[2]
    most = int(text.partition("engine.max_num_seqs ")[2].partition(",")[0])
    budget = int(0.9 * memory.total_bytes) - GIB

    def left(num_seqs: int) -> int:
        found = estimate(LLAMA_8B, max_num_seqs=num_seqs, max_num_batched_tokens=8192)
        return budget - found.weights - found.step - found.cache_bytes(8192)

    assert left(most) >= 0 > left(most + 1)
    assert "max_num_seqs" not in said(memory, max_model_len=131_072), "it is not what is too large"


def test_of_unknown_weights_the_settings_that_matter_are_named() -> None:
    text = advice(replace(SETTINGS, needs=None), (256, 8192), Memory(GIB, GIB))
    assert "model.max_model_len (now 8192) or engine.max_num_seqs (now 256)" in text


def test_on_a_cpu_no_share_of_a_gpu_is_named() -> None:
    text = said(Memory(64 * GIB, 20 * GIB, is_gpu=False), max_model_len=131_072)
    assert text.startswith("What would fit: model.max_model_len 3")
    assert "gpu" not in text and "parallel" not in text


# What other processes leave.


@pytest.mark.parametrize(
    ("total", "free", "share"),
    [(140, 139.6, 0.9), (140, 70, 0.49), (24, 23.6, 0.9), (80, 2, 0.01)],
)
def test_auto_is_nine_tenths_or_what_others_leave(total: float, free: float, share: float) -> None:
    assert auto_utilization(Memory(int(total * GIB), int(free * GIB))) == share


def test_a_device_that_others_fill_is_refused_and_an_unknown_one_is_taken() -> None:
    with pytest.raises(MemoryHeld, match=r"other processes hold .* 1\.0 GiB of 80\.0 GiB are"):
        auto_utilization(Memory(80 * GIB, GIB))
    assert auto_utilization(None) == 0.9


@pytest.mark.parametrize(
    ("name", "gib", "sizes"),
    [
        ("NVIDIA H200", 140, (1024, 16384)),
        ("NVIDIA A100-SXM4-80GB", 80, (256, 8192)),
        ("NVIDIA L4", 23, (256, 8192)),
    ],
)
def test_sizes_are_vllms_by_device(name: str, gib: int, sizes: tuple[int, int]) -> None:
    assert auto_sizes([Gpu(name, gib * GIB, gib * GIB, (8, 0))], is_cpu=False) == sizes


class FakeNvml:
    """The driver's management library on a host with two devices, one of them half full."""

    FREE_GIB = (139, 70)

    def nvmlInit_v2(self) -> int:
        return 0

    nvmlShutdown = nvmlInit_v2

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        handle._obj.value = index + 1
        return int(index > 1)

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        handle._obj.value = 2
        return int(uuid != b"GPU-b")

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: Any, parent: Any) -> int:
        return 2  # not one

    def nvmlDeviceGetName(self, handle: Any, name: Any, length: int) -> int:
        name.value = b"NVIDIA H200"
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.total = 140 * GIB
        memory._obj.free = self.FREE_GIB[handle.value - 1] * GIB
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> int:
        major._obj.value, minor._obj.value = 9, 0
        return 0


@pytest.mark.parametrize(
    ("visible", "free_gib"),
    [
        (None, [139, 70]),
        ("1", [70]),
        ("1,0", [70, 139]),
        ("GPU-b", [70]),
        ("GPU-unknown", [139, 70]),
        ("", []),
        ("-1", []),
    ],
)
def test_the_visible_devices_are_looked_at(
    visible: str | None, free_gib: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeNvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = hardware.gpus()
    assert [gpu.free_bytes // GIB for gpu in found] == free_gib
    assert all((gpu.name, gpu.capability) == ("NVIDIA H200", (9, 0)) for gpu in found)


# In the commands.


def test_plan_and_doctor_say_what_a_job_takes(folder: Place, tmp_path: Path) -> None:
    folder.write_parquet("in/a.parquet", rows(4))
    # By name: `auto` is float32 on a CPU without bfloat16 arithmetic.
    changes = {"model": {"dtype": "bfloat16"}, "engine": {"max_num_seqs": 8}}
    path = write_job(tmp_path, job(folder, **changes))
    planned = run(path, command=("plan",))
    assert planned.code == 0, planned.stderr
    lines = [line for line in planned.stdout.splitlines() if line.startswith("memory")]
    assert "about 13.3 MiB of weights (none)" in lines[0]
    assert "6.4 MiB of KV cache for 2,048 tokens" in lines[0]
    # What 8 sequences of full length can use, in blocks of 128 tokens, less the one vLLM keeps.
    assert f"room for {8 * (2048 + 128) - 128:,} tokens, 8 sequences of 2,048" in lines[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # Of 3,072 bytes a token, in blocks of 128 tokens, less the one that vLLM keeps.
        ({"engine": {"options": {"kv_cache_memory_bytes": 40 * 128 * 3072}}}, "room for 4,992 "),
        (
            {"engine": {"options": {"kv_cache_memory_bytes": 9 * 128 * 3072}}},
            "does not fit: .*What would fit: model.max_model_len 1024, or engine.options.kv_cache",
        ),
        ({"engine": {"max_num_seqs": 6000}}, "step of 6,000 tokens and 6,000 sequences"),
        ({"engine": {"max_num_batched_tokens": 100}}, "step of 100 tokens and 100 sequences"),
        (
            {"sampling": {"seed": 1, "temperature": 1}, "engine": {"max_num_batched_tokens": 100}},
            "max_num_batched_tokens is 100, but prompts are read whole",
        ),
    ],
)
def test_plan_takes_the_sizes_that_a_run_takes(
    folder: Place, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    found = Job.model_validate(job(folder, **changes))
    model = read_model(str(MODEL))
    try:
        said = " ".join(engine_kind("vllm").describe_memory(engine_spec(found, model)))
    except ConfigError as error:
        said = str(error)
    assert re.search(words, said), said


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"save_mode": True}, "model.save_mode cannot run here: it moves data between a GPU"),
        ({"cpu_offload_gib": 2}, "model.cpu_offload_gib cannot run here"),
        ({"save_mode_gib": 2}, "save_mode_gib: is the size of save_mode"),
    ],
)
def test_save_mode_and_offload_are_refused_on_a_cpu(
    folder: Place, tmp_path: Path, model: dict[str, Any], words: str
) -> None:
    folder.write_parquet("in/a.parquet", rows(4))
    ended = run(write_job(tmp_path, job(folder, model={"path": str(MODEL), **model})))
    assert ended.code == 2
    assert words in ended.stderr


def test_the_share_of_a_gpu_is_a_number_or_auto(folder: Place) -> None:
    for value in ("auto", 0.5, 1):
        found = Job.model_validate(job(folder, engine={"gpu_memory_utilization": value}))
        assert found.engine.gpu_memory_utilization == value
    for value in (0, 1.2, "half", True):
        with pytest.raises(ValueError, match="must be auto or a number above 0 to 1"):
            Job.model_validate(job(folder, engine={"gpu_memory_utilization": value}))
