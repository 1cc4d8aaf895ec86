"""Making quantized checkpoints: what is written, what is left by a death, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from batchinfer.cli.doctor import show_made_checkpoints
from batchinfer.errors import ConfigError
from batchinfer.making.cached import cached_checkpoint
from batchinfer.making.environment import environment_folder
from batchinfer.making.layers import linear_layers
from batchinfer.making.publish import publish_folder, sweep
from batchinfer.making.tensor_files import TensorFolder, TensorSpec
from batchinfer.quantization import RECIPES, Machine
from batchinfer.storage.flock import FileLock
from tests.support.adapters import write_adapter
from tests.support.cpus import runs_here
from tests.support.jobs import MODEL, ROOT, Ended, run, run_python
from tests.support.models import read_model

CPU = Machine("cpu", packages=frozenset({"compressed-tensors"}), engine="vllm")

#: Method -> the kind of tests/support/checkpoints that has the same format, packed by hand.
HAND_PACKED = {
    "int8": "w8a8",
    "int4": "w4a16",
    "fp8": "fp8-channel",
    "nvfp4": "nvfp4",
    "mxfp4": "mxfp4",
}
#: Root mean square of what rounding may change, as a share of the weights' own.
ERROR = {"int8": 0.01, "int4": 0.13, "fp8": 0.04, "nvfp4": 0.12, "mxfp4": 0.15}


def quantize(*arguments: str | Path, **environ: str) -> Ended:
    """`batchinfer quantize`, in a process of its own."""
    first, *rest = map(str, arguments)
    return run(first, *rest, command=("quantize",), engine="real", environ=environ)


@pytest.fixture
def damaged_model(tmp_path: Path) -> Path:
    model = tmp_path / "damaged"
    shutil.copytree(MODEL, model)
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    return model


# What is written.


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its imports
@pytest.mark.parametrize("method", HAND_PACKED)
def test_a_made_checkpoint_holds_the_models_weights_in_the_format_of_its_scheme(
    method: str, tmp_path: Path
) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from safetensors.torch import load_file

    from batchinfer.making.rounding_writer import round_to_nearest
    from tests.support.checkpoints import KINDS

    recipe = RECIPES[method]
    moves: list[tuple[int, int]] = []
    made = round_to_nearest(MODEL, tmp_path, recipe, lambda *move: moves.append(move))
    assert (made.num_quantized, made.num_linear) == (42, 42)
    assert moves == sorted(moves) and moves[-1][0] == moves[-1][1]
    assert read_model(str(tmp_path)).quantization == recipe.makes
    assert {f.name for f in tmp_path.iterdir()} == {f.name for f in MODEL.iterdir()}
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]

    before, after = (
        load_file(MODEL / "model.safetensors"),
        load_file(tmp_path / "model.safetensors"),
    )
    scheme = preset_name_to_scheme(recipe.preset, ["Linear"])
    packer: Any = BaseCompressor.get_value_from_registry(config["format"])
    for name, weight in before.items():
        layer = name.removesuffix(".weight")
        if not name.endswith("_proj.weight"):
            assert after[name].equal(weight)
            continue
        parts = {n.rpartition(".")[2]: t for n, t in after.items() if n.startswith(f"{layer}.")}
        by_hand = KINDS[HAND_PACKED[method]].pack(weight.float())
        assert {n: t.shape for n, t in parts.items()} == {n: t.shape for n, t in by_hand.items()}
        parts["weight_scale"] = (
            parts["weight_scale"].float() if method != "mxfp4" else parts["weight_scale"]
        )
        restored = packer.decompress(parts, scheme)["weight"].float()
        error = (restored - weight.float()).square().mean() / weight.float().square().mean()
        assert error.sqrt() < ERROR[method], name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_layers_that_vllm_computes_as_one_share_the_scale_of_the_whole_tensor(
    tmp_path: Path,
) -> None:
    from safetensors.torch import load_file

    from batchinfer.making.rounding_writer import round_to_nearest

    round_to_nearest(MODEL, tmp_path, RECIPES["nvfp4"], lambda *_: None)
    tensors = load_file(tmp_path / "model.safetensors")
    scales = {n: t.item() for n, t in tensors.items() if n.endswith("weight_global_scale")}
    assert len(scales) == 42
    for layer in range(6):
        for names in ("self_attn.{q,k,v}_proj", "mlp.{gate,up}_proj"):
            start, _, rest = names.partition("{")
            members, _, end = rest.partition("}")
            assert (
                len(
                    {
                        scales[f"model.layers.{layer}.{start}{member}{end}.weight_global_scale"]
                        for member in members.split(",")
                    }
                )
                == 1
            )
    assert len(set(scales.values())) > 12


def test_a_large_model_is_several_files_and_an_index(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    specs = [
        TensorSpec("a", "I8", (3,)),
        TensorSpec("b", "F32", (2,)),
        TensorSpec("c", "I64", (1,)),
    ]
    files = TensorFolder(tmp_path, specs, max_file_bytes=12)
    for name, content in (("b", b"\0\0\x80?\0\0\0@"), ("c", b"\7" + bytes(7)), ("a", b"\1\2\3")):
        files.write(name, memoryview(content))
    files.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 19
    found = {name: load_file(tmp_path / file)[name] for name, file in index["weight_map"].items()}
    assert {name: value.tolist() for name, value in found.items()} == {
        "a": [1, 2, 3],
        "b": [1.0, 2.0],
        "c": [7],
    }
    assert len(set(index["weight_map"].values())) == 2


def test_a_file_that_lacks_a_planned_tensor_is_never_taken_for_whole(tmp_path: Path) -> None:
    files = TensorFolder(tmp_path, [TensorSpec("a", "I8", (3,)), TensorSpec("b", "I8", (3,))])
    files.write("a", memoryview(b"abc"))
    with pytest.raises(AssertionError, match=r"model\.safetensors lacks b"):
        files.close()
    files.abandon()


def test_the_command_writes_a_folder_that_says_what_it_is(tmp_path: Path) -> None:
    ended = quantize(MODEL, tmp_path / "new" / "out", "--method", "int4")
    assert ended.code == 0, ended.stderr
    assert "quantized 42 of 42 linear layers" in ended.stderr
    assert str(tmp_path / "new" / "out") in ended.stdout
    assert read_model(str(tmp_path / "new" / "out")).quantization == "int4"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    again = quantize(tmp_path / "new" / "out", tmp_path / "other", "--method", "int8")
    assert again.code == 2
    assert "is already quantized (int4)" in again.stderr


@pytest.mark.real_engine
def test_vllm_alone_loads_a_made_checkpoint(tmp_path: Path) -> None:
    methods = [method for method in ("int8", "int4") if runs_here(method)]
    for method in methods:
        assert quantize(MODEL, tmp_path / method, "--method", method).code == 0
    models = [str(MODEL), *(str(tmp_path / method) for method in methods)]
    done = run_python("-m", "tests.support.plain_vllm", *models, timeout_s=200)
    assert done.code == 0, done.stderr
    plain, *made = map(json.loads, done.stdout.splitlines())
    assert len(made) == len(methods) > 0
    for tokens in made:
        assert tokens[:8] == plain[:8]  # for a while, as weights in a wrong order never would


@pytest.mark.skipif(
    not environment_folder(is_cpu=True).exists(),
    reason="llm-compressor's environment is not made (batchinfer quantize --method gptq makes it)",
)
def test_a_calibrated_checkpoint_is_made_by_a_process_in_another_environment(
    tmp_path: Path,
) -> None:
    texts = pl.DataFrame({"text": [None, *(f"The number {i} is {i}." for i in range(9))]})
    texts.write_parquet(tmp_path / "texts.parquet")
    calibration = ("--calibration", tmp_path / "texts.parquet", "--column", "text", "--rows", "8")
    ended = quantize(MODEL, tmp_path / "out", "--method", "gptq", *calibration)
    assert ended.code == 0, ended.stderr
    assert "calibrating gptq with 8 rows" in ended.stderr
    assert read_model(str(tmp_path / "out")).quantization == "int4"
    tokenizer = "tokenizer.json"
    assert (tmp_path / "out" / tokenizer).read_bytes() == (MODEL / tokenizer).read_bytes()


# Refused before anything is computed.


def test_what_the_command_cannot_do_is_reported_immediately(
    tmp_path: Path, damaged_model: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    texts, numbers = tmp_path / "texts.parquet", tmp_path / "numbers.parquet"
    pl.DataFrame({"text": ["a", None, ""], "number": [1, 2, 3]}).write_parquet(texts)
    pl.DataFrame({"text": [None, ""]}, {"text": pl.String}).write_parquet(numbers)
    out = tmp_path / "out"
    calibrated = (MODEL, out, "--method", "gptq", "--calibration")
    for arguments, words in (
        ((damaged_model, out, "--method", "int8"), "truncated or damaged, copy it again"),
        ((MODEL, full, "--method", "int8"), "exists: choose another OUT"),
        ((MODEL, tmp_path / "m-00001-of-00002.gguf", "--method", "gguf"), "one of several files"),
        ((MODEL, "s3://bucket/out", "--method", "int8"), "read from local folders"),
        ((MODEL, out, "--method", "int9"), "int9"),
        ((MODEL, out, "--method", "awq"), "needs --calibration PARQUET and --column NAME"),
        ((MODEL, out, "--method", "int8", "--column", "text"), "takes no --calibration"),
        ((MODEL, out, "--method", "int8", "--rows", "8"), "--rows goes with --calibration"),
        ((MODEL, out, "--method", "int8", "--bits", "8"), "takes no --bits"),
        ((*calibrated, texts, "--column", "test"), "no column 'test' (did you mean 'text'?)"),
        ((*calibrated, texts, "--column", "number"), "column 'number' is int64, not text"),
        ((*calibrated, numbers, "--column", "text"), "has no text"),
        ((*calibrated, tmp_path / "none", "--column", "text"), "--calibration: nothing matches"),
    ):
        ended = quantize(*arguments)
        assert ended.code == 2, ended.stderr
        assert words in " ".join(ended.stderr.split())
        assert not out.exists()


@pytest.mark.parametrize("name", ["mlp.experts.down_proj", "block_sparse_moe.input_linear.weight"])
def test_experts_in_one_tensor_are_not_quantized_around(name: str, tmp_path: Path) -> None:
    shapes = {f"model.layers.0.{name}": (4, 128, 128), "model.layers.0.o_proj.weight": (128, 128)}
    with pytest.raises(ConfigError, match="keeps the experts of a layer in one tensor"):
        linear_layers(tmp_path, shapes)


def test_out_and_model_are_not_inside_one_another(tmp_path: Path) -> None:
    """Not by another spelling or a link either; and the advice is never to delete the model."""
    model = Path(shutil.copytree(MODEL, tmp_path / "models" / "model"))
    (tmp_path / "link").symlink_to(model)
    before = sorted(tmp_path.rglob("*"))
    for out in (model / "int8", tmp_path / "link" / "a" / "b", model, model.parent, tmp_path):
        ended = quantize(f"{model.parent}/../models/model", out, "--method", "int8")
        assert ended.code == 2, ended.stderr
        assert "are one folder, or one is inside the other" in ended.stderr
        assert "delete" not in ended.stderr
        assert sorted(tmp_path.rglob("*")) == before


def test_help_says_what_bits_are_for() -> None:
    said = " ".join(quantize("--help").stdout.split())
    assert "Only with --method qtip, which needs it: no default. [1<=x<=8]" in said


def test_the_current_folder_is_never_replaced(tmp_path: Path) -> None:
    here, link = tmp_path / "here", tmp_path / "link"
    here.mkdir()
    link.symlink_to(here)
    for cwd, out in ((here, "."), (here, str(link)), (link, str(here))):
        ended = subprocess.run(
            [sys.executable, "-m", "batchinfer", "quantize", MODEL, out, "--method", "int8"],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 2, ended.stderr
        assert "give a new folder in it as OUT" in ended.stderr
        assert here.is_dir() and set(tmp_path.iterdir()) == {here, link}


def test_a_link_as_out_stays_one_and_what_it_points_to_is_filled(tmp_path: Path) -> None:
    disk, link = tmp_path / "disk", tmp_path / "link"
    disk.mkdir()
    link.symlink_to(disk)
    ended = quantize(MODEL, link, "--method", "int8")
    assert ended.code == 0, ended.stderr
    assert link.is_symlink()
    assert read_model(str(disk)).quantization == "int8"
    assert set(tmp_path.iterdir()) == {disk, link}


def test_packages_that_cannot_be_fetched_are_one_sentence_and_leave_no_environment(
    tmp_path: Path,
) -> None:
    pl.DataFrame({"text": ["a"]}).write_parquet(tmp_path / "a.parquet")
    calibration = ("--calibration", tmp_path / "a.parquet", "--column", "text")
    environ = {"XDG_CACHE_HOME": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    out = tmp_path / "out"
    ended = quantize(MODEL, out, "--method", "awq", *calibration, **environ)
    assert ended.code == 2
    assert "torch cannot be fetched: ERROR: No matching distribution" in ended.stderr
    assert "int8, int4, fp8, nvfp4 and mxfp4 need none" in ended.stderr
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith((".llm", ".out"))]


# The cache.


@pytest.mark.real_engine
def test_a_death_while_making_leaves_nothing_and_of_two_makers_one_waits(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.make_cached", str(MODEL), "int8"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=True,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    of_another_method, killed, *both = json.loads(done.stdout)
    assert of_another_method["code"] == killed["code"] == -9
    assert [outcome["code"] for outcome in both] == [0, 0], done.stderr
    (folder,) = {outcome["lines"][-1] for outcome in both}
    said = ["\n".join(outcome["lines"]) for outcome in both]
    assert sum("quantized 42 of 42 linear layers" in lines for lines in said) == 1
    assert sum("another process makes" in lines for lines in said) == 1
    assert read_model(folder).quantization == "int8"
    left = {path.name for path in (tmp_path / "batchinfer" / "models").iterdir()}
    assert left == {Path(folder).name, ".hashes"}


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Folders that would have been made, instead of making them."""
    found: list[Path] = []

    def publish(target: Path, *_: object, **__: object) -> bool:
        found.append(target)
        if not target.exists():
            shutil.copytree(MODEL, target)
        return True

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("batchinfer.making.cached.publish_folder", publish)
    return found


def test_a_checkpoint_is_found_by_the_content_of_its_model(
    published: list[Path], tmp_path: Path
) -> None:
    models = [tmp_path / "model", tmp_path / ("copy" * 60), tmp_path / "tuned"]
    for model in models:
        shutil.copytree(MODEL, model)
    with (models[2] / "model.safetensors").open("r+b") as stream:  # same shapes, other weights
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x11")
    for model in models:
        for method in ("int8", "int4"):
            cached_checkpoint(read_model(str(model), quantization=method, machine=CPU))
    names = [path.name for path in published]
    assert names[:2] == names[2:4]  # a copy finds it
    assert len(set(names)) == 4  # another content does not, nor does another method
    os.utime(models[0] / "model.safetensors")
    with (models[0] / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x11")
    cached_checkpoint(read_model(str(models[0]), quantization="int8", machine=CPU))
    assert published[-1].name == names[4]


def test_adapters_and_other_tokenizers_share_the_checkpoint_of_their_model(
    published: list[Path], tmp_path: Path
) -> None:
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(MODEL, tokenizer)
    beside: list[dict[str, Any]] = [{}, {"tokenizer": str(tokenizer)}]
    beside += [
        {"lora": str(write_adapter(tmp_path / f"adapter-{scale}", scale=scale))}
        for scale in (0.1, 0.2)
    ]
    for changes in beside:
        cached_checkpoint(read_model(str(MODEL), quantization="int4", machine=CPU, **changes))
    assert len({path.name for path in published}) == 1


def test_a_cached_checkpoint_that_was_damaged_is_named(published: list[Path]) -> None:
    model = read_model(str(MODEL), quantization="int8", machine=CPU)
    file = cached_checkpoint(model) / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ConfigError, match=r"made earlier, is damaged .* delete that folder"):
        cached_checkpoint(model)


def test_a_cache_that_cannot_be_written_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    model = read_model(str(MODEL), quantization="int8", machine=CPU)
    with pytest.raises(ConfigError, match=r"file/batchinfer.* Set XDG_CACHE_HOME .* --method int8"):
        cached_checkpoint(model)


def test_doctor_has_a_line_for_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def line() -> str:
        show_made_checkpoints()
        return capsys.readouterr().out.strip()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    models = tmp_path / "cache" / "batchinfer" / "models"
    assert line() == f"ok       cache     {models}: 0 made checkpoints, 0 bytes"
    assert not (tmp_path / "cache").exists()
    for name in ("int8-0", "int4-1", ".int4-2.01234567.tmp", ".hashes"):
        (models / name).mkdir(parents=True)
        (models / name / "model.safetensors").write_bytes(bytes(600))
    assert line().endswith("models: 2 made checkpoints, 1,200 bytes")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert line().startswith("no       cache ")
    assert line().endswith("cannot be written: set XDG_CACHE_HOME to a folder that can")


def test_the_digest_of_a_job_names_how_its_checkpoint_is_made_and_not_whether_it_is() -> None:
    plain = read_model(str(MODEL), machine=CPU)
    made = read_model(str(MODEL), quantization="int8", machine=CPU)
    assert made.digest["made by"] == RECIPES["int8"].identity
    assert {n: v for n, v in made.digest.items() if n != "made by"} == plain.digest
    assert RECIPES["int8"].identity != replace(RECIPES["int8"], revision=2).identity


def test_what_fails_while_it_is_made_leaves_no_folder(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_text("")
        raise ConfigError("no")

    options: dict[str, Any] = {"on_wait": lambda: None, "advice": ""}
    with pytest.raises(ConfigError):
        publish_folder(tmp_path / "made", fill, **options)
    assert not list(tmp_path.iterdir())
    (tmp_path / "made").mkdir()
    assert publish_folder(tmp_path / "made", lambda path: (path / "a").write_text(""), **options)
    assert not publish_folder(tmp_path / "made", fill, **options)  # it is there: nothing is filled


def test_what_a_dead_process_left_is_deleted_and_what_is_being_made_is_not(tmp_path: Path) -> None:
    for name in (".dead.0123abcd.tmp", ".alive.0123abcd.tmp", ".unlocked.0123abcd.tmp", "made"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("")
    for name in (".dead.lock", ".alone.lock"):
        (tmp_path / name).write_text("")
    lock = FileLock(tmp_path / ".alive.lock")
    assert lock.acquire()
    sweep(tmp_path)
    kept = {".alive.0123abcd.tmp", ".alive.lock", "made"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    lock.release()  # as the kernel does for the dead
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"made"}
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["model.safetensors"]
