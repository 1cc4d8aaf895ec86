"""Shapes that contradict config.json, and compilers that are not there: refused before loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from batchinfer.engine.vllm.compiler import check_compiler
from batchinfer.errors import ConfigError
from batchinfer.model.contradictions import check_shapes
from batchinfer.model.stored import check_stored
from batchinfer.model.weights import Weights, read_header
from batchinfer.quantization import Checkpoint, Machine, Tensor
from tests.support.endings import must_be_untouched, must_fail
from tests.support.jobs import MODEL, Place, job, rows, run, write_job
from tests.support.models import read_model

CPU, GPU = Machine("cpu", engine="vllm"), Machine("cuda", compute_capability=(9, 0), engine="vllm")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# AWQ and GPTQ.


def check_layout(
    tensors: dict[str, Tensor], scheme: str, settings: dict[str, Any] | None = None
) -> None:
    weights = Weights(tensors=tensors, dtypes={"I32": 1})
    check_stored(Checkpoint(scheme, scheme), settings, weights, Path("folder"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its imports
def test_awq_and_gptq_are_distinguished_by_their_shapes(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from tests.support.checkpoints import KINDS

    for num_out, num_in in ((256, 512), (512, 256), (256, 256), (128, 1024), (1024, 128)):
        for kind in ("awq", "gptq"):
            packed = KINDS[kind].pack(torch.randn(num_out, num_in))
            tensors = {f"a.q_proj.{n}": t.contiguous() for n, t in packed.items()}
            save_file(tensors, tmp_path / "file")
            _, found = read_header(tmp_path / "file")
            check_layout(found, kind)
            for other in {"awq", "gptq", "gptq-8bit"} - {kind}:
                with pytest.raises(ConfigError, match=r"say .* but a\.q_proj\.qweight .* copy it"):
                    check_layout(found, other)
            check_layout(found, "quark")
            if kind == "gptq":  # rules of GPTQModel give single layers other bits
                check_layout(found, "gptq-8bit", {"dynamic": {"q_proj": {"bits": 4}}})


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_awq_of_its_gemv_version_is_refused(group_size: int) -> None:
    num_out, num_in = 512, 1024
    # AutoAWQ pads the groups of a row to a multiple of 64, 32 or 16.
    multiple = 8 * {32: 4, 64: 2, 128: 1}[group_size]
    num_groups = -(-num_in // group_size // multiple) * multiple
    tensors = {
        "a.qweight": Tensor("I32", (num_out, num_in // 8), num_out * num_in // 2),
        "a.qzeros": Tensor("I32", (num_out, num_groups // 8), 0),
        "a.scales": Tensor("F16", (num_out, num_groups), 0),
    }
    for scheme in ("awq", "gptq"):
        with pytest.raises(ConfigError, match="GEMV version, which vLLM does not read"):
            check_layout(tensors, scheme)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_config_of_the_other_format_is_refused_before_it_loads(tmp_path: Path) -> None:
    from tests.support.checkpoints import KINDS, write_checkpoint

    for kind, other in (("awq", "gptq"), ("gptq", "awq")):
        folder = write_checkpoint(kind, tmp_path / kind)
        assert read_model(str(folder)).quantization == kind
        change_config(folder, quantization_config=dict(KINDS[other].settings))
        with pytest.raises(ConfigError, match=f"is in the layout of {kind.upper()}: config.json"):
            read_model(str(folder), quantization=other)


# Sizes.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 512}, r"layers\.0\.input_layernorm\.weight is \[256\], .* \[512\] \(hi"),
        ({"vocab_size": 4100}, r"embed_tokens\.weight is \[4096, 256\], .* \[4100, 256\] \(vo"),
        ({"intermediate_size": 768}, r"down_proj\.weight is \[256, \d+\], .* \[256, 768\]"),
    ],
)
def test_a_config_of_another_size_is_refused(
    folder: Path, changes: dict[str, Any], words: str
) -> None:
    change_config(folder, **changes)
    with pytest.raises(ConfigError, match=words):
        read_model(str(folder))


def test_sizes_that_may_be_of_another_model_are_left_to_the_engine() -> None:
    tensors = {"model.embed_tokens.weight": Tensor("BF16", (64, 8), 1024)}
    sizes = {"hidden_size": 16, "vocab_size": 64}
    with pytest.raises(ConfigError, match="not of one model"):
        check_shapes(tensors, sizes, Path("folder"))
    check_shapes(tensors, sizes | {"text_config": {"hidden_size": 8}}, Path("folder"))
    check_shapes(tensors, {"hidden_size": 8, "vocab_size": None}, Path("folder"))
    packed = {"model.embed_tokens.weight": Tensor("I8", (64, 8), 512)}
    check_shapes(packed, sizes, Path("folder"))


# Compilers.


def program(folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)


def test_a_job_that_is_compiled_needs_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CC", "CXX", "TRITON_CACHE_DIR", "TORCH_INDUCTOR_INSTALL_GXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    compiled = {"enforce_eager": False}
    check_compiler({}, CPU)
    check_compiler(compiled, Machine(None, engine="vllm"))
    check_compiler(compiled | {"compilation_config": {"mode": 0}}, CPU)
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler is found: install g\+\+"):
        check_compiler(compiled, CPU)
    with pytest.raises(ConfigError, match="no C compiler is found"):
        check_compiler({}, GPU)
    (tmp_path / ".triton" / "cache").mkdir(parents=True)
    with pytest.raises(ConfigError, match="no C compiler is found"):
        check_compiler({}, GPU)
    (tmp_path / ".triton" / "cache" / "built").write_text("")
    check_compiler({}, GPU)
    program(tmp_path / "bin", "clang")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path / "none"))
    check_compiler({}, GPU)
    monkeypatch.setenv("CC", "gcc-99")
    with pytest.raises(ConfigError, match="set CC"):
        check_compiler({}, GPU)
    with pytest.raises(ConfigError, match=r"C\+\+"):
        check_compiler(compiled, CPU)
    program(tmp_path / "bin", "c++-99")
    monkeypatch.setenv("CXX", "c++-99")
    check_compiler(compiled, CPU)


def test_no_compiler_for_a_compiled_job_is_refused_before_it_loads(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "data"))
    place.write_parquet("in/s0.parquet", rows(2))
    settings = job(place, engine={"options": {"enforce_eager": False}})
    environ = {"PATH": str(tmp_path), "CXX": "g++"}
    fake = {"fail_build": "the model was loaded"}
    path = write_job(tmp_path, settings)
    must_fail(run(path, environ=environ, fake=fake), 2, "enforce_eager: false", "no C++ compiler")
    must_be_untouched(place)
