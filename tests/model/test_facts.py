"""Facts of a model folder, and what is said about folders that cannot work."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import batchinfer.model
from batchinfer.config import ModelSettings
from batchinfer.errors import ConfigError
from batchinfer.making.layers import linear_layers
from batchinfer.model.shape import kv_bytes_per_token, shape_of, text_config
from batchinfer.model.stored import check_stored
from batchinfer.model.weights import DTYPE_BITS, Tensor, Weights
from batchinfer.quantization import Machine, detect
from tests.support.headers import Header, change_header
from tests.support.models import read_model

PACKAGES = frozenset({"compressed-tensors", "bitsandbytes"})
CPU = Machine("cpu", packages=PACKAGES, engine="vllm")
H200 = Machine("cuda", compute_capability=(9, 0), packages=PACKAGES, engine="vllm")
DTYPE_BYTES = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1}
DEMO = Path(__file__).parents[2] / "jobs" / "demo" / "model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def change(file: Path, **settings: Any) -> None:
    content = json.loads(file.read_text())
    content |= settings
    content = {key: value for key, value in content.items() if value is not None}
    file.write_text(json.dumps(content))


def test_facts_of_the_demo_model() -> None:
    facts = read_model(str(DEMO))
    assert facts.path == facts.tokenizer_path == str(DEMO)
    assert (facts.dtype, facts.quantization) == ("bfloat16", "none")
    assert (facts.max_model_len, facts.vocab_size, facts.eos_token_ids) == (2048, 4096, (2,))
    assert facts.weights_bytes == (DEMO / "model.safetensors").stat().st_size
    assert facts.kv_bytes_per_token == 2 * 6 * 2 * 64 * 2
    assert facts.notes == ()


def test_torch_is_not_loaded() -> None:
    program = (
        "import sys\nfrom batchinfer.config import ModelSettings\n"
        "from batchinfer.model import read_model\n"
        "read_model(ModelSettings(path=sys.argv[1]))\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(DEMO)], check=True)


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"],
)
def test_the_digest_changes_with_each_file(folder: Path, name: str) -> None:
    before = read_model(str(folder)).digest
    file = folder / name
    file.write_bytes(file.read_bytes() + b" ")
    after = read_model(str(folder)).digest
    assert {key for key in before if before[key] != after[key]} == {name}


def test_the_digest_is_of_content_not_of_place(folder: Path) -> None:
    assert read_model(str(folder)).digest == read_model(str(DEMO)).digest


def test_other_weights_of_the_same_size_have_another_header(folder: Path) -> None:
    before = read_model(str(folder)).digest
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b"layers.0.", b"layers._.")
    header = header.replace(b"layers.1.", b"layers.0.").replace(b"layers._.", b"layers.1.")
    content[8 : 8 + length] = header
    file.write_bytes(content)
    assert read_model(str(folder)).digest["weights"] != before["weights"]


def test_a_tokenizer_of_its_own_is_in_the_digest(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "tokenizer"))
    (folder / "tokenizer.json").unlink()
    facts = read_model(str(folder), tokenizer=str(other))
    assert facts.tokenizer_path == str(other)
    assert "tokenizer/tokenizer.json" in facts.digest


@pytest.mark.parametrize(
    ("settings", "asked", "found"),
    [
        ({}, "float16", "float16"),
        ({"dtype": "float16"}, "auto", "float16"),
        ({"dtype": None, "torch_dtype": "float16"}, "auto", "float16"),
        ({"dtype": None}, "auto", "bfloat16"),
        ({"dtype": "float32"}, "float32", "float32"),
    ],
)
def test_dtype_is_what_was_asked_for_or_the_checkpoints(
    folder: Path, settings: dict[str, Any], asked: str, found: str
) -> None:
    change(folder / "config.json", **settings)
    facts = read_model(str(folder), dtype=asked)
    assert (facts.dtype, facts.notes) == (found, ())


def test_a_float32_checkpoint_is_computed_in_bfloat16_and_that_is_said(folder: Path) -> None:
    change(folder / "config.json", dtype="float32")
    facts = read_model(str(folder))
    assert facts.dtype == "bfloat16"
    assert "float32" in facts.notes[0]


AWQ = {"quant_method": "awq", "bits": 4}


def store_as(file: Path, dtype: str) -> None:
    """Say in the header that the weights are of another dtype, with as many bytes."""

    def change(header: Header) -> None:
        for tensor in header.values():
            if tensor.get("dtype") == "BF16":
                *others, size = tensor["shape"]
                num_bits = DTYPE_BITS[dtype]
                tensor |= {"dtype": dtype, "shape": [*others, size * 16 // num_bits]}

    change_header(file, change)


def weights_of(tensors: dict[str, tuple[Any, ...]]) -> Weights:
    """As headers say: dtype and shape of each tensor."""
    weights = Weights()
    for name, (dtype, *shape) in tensors.items():
        num_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
        weights.tensors[name] = Tensor(dtype, tuple(shape), num_bytes)
        weights.dtypes[dtype] = weights.dtypes.get(dtype, 0) + num_bytes
    return weights


def test_quantization_is_the_checkpoints_and_contradictions_are_refused(folder: Path) -> None:
    change(folder / "config.json", quantization_config=AWQ)
    store_as(folder / "model.safetensors", "I32")
    assert read_model(str(folder)).quantization == "awq"
    assert read_model(str(folder), quantization="awq").engine_quantization is None
    for asked in ("fp16", "gptq", "int8"):
        with pytest.raises(ConfigError, match=f"{asked}, but the checkpoint is AWQ .* write awq"):
            read_model(str(folder), quantization=asked, dtype="float16")


@pytest.mark.parametrize("place", ["config.json", "text_config", "hf_quant_config.json"])
def test_quantization_settings_are_found_where_families_write_them(
    folder: Path, place: str
) -> None:
    store_as(folder / "model.safetensors", "U8")
    if place == "config.json":
        change(folder / place, compression_config={"quant_method": "mxfp4"})
    elif place == "text_config":
        nested = json.loads((folder / "config.json").read_text())
        nested["quantization_config"] = {"quant_method": "mxfp4"}
        (folder / "config.json").write_text(json.dumps({"text_config": nested}))
    else:
        (folder / place).write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert read_model(str(folder)).quantization == "fp4"


@pytest.mark.parametrize("settings", ["FP8", 3, [], True])
def test_settings_that_are_not_an_object_are_named(folder: Path, settings: Any) -> None:
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": settings}))
    with pytest.raises(ConfigError, match=r"hf_quant_config\.json: quantization is .*, not an obj"):
        read_model(str(folder))


def test_an_old_gptq_folder_is_distinguished_from_an_unquantized_one(folder: Path) -> None:
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4}))
    with pytest.raises(ConfigError, match="put its content there as quantization_config"):
        read_model(str(folder))


def test_a_few_packed_layers_among_many_others_are_a_quantized_checkpoint() -> None:
    few = weights_of({"embed.weight": ("BF16", 4096, 64), "mlp.qweight": ("I32", 8, 8)})
    check_stored(detect(AWQ, "config.json"), AWQ, few, Path("model"))


def test_weights_that_are_not_stored_as_the_settings_say_are_refused(folder: Path) -> None:
    change(folder / "config.json", quantization_config=AWQ)
    with pytest.raises(ConfigError, match=r"say AWQ .* stored as BF16"):
        read_model(str(folder))
    change(folder / "config.json", quantization_config=None)
    store_as(folder / "model.safetensors", "I8")
    with pytest.raises(ConfigError, match=r"say unquantized, .* stored as I8"):
        read_model(str(folder))


def test_attention_masks_of_old_models_are_not_packed_weights() -> None:
    shapes: dict[bool, tuple[int, ...]] = {False: (1, 1, 2048, 2048), True: (2048, 2048)}
    for is_refused, shape in shapes.items():
        weights = weights_of({"mlp.weight": ("F16", 1024, 1024), "attention.bias": ("U8", *shape)})
        with pytest.raises(ConfigError, match="U8") if is_refused else contextlib.nullcontext():
            check_stored(detect(None, ""), None, weights, Path("model"))


@pytest.mark.parametrize("said", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize(
    ("stored", "storage"), [("nf4", "U8"), ("nf4", "BF16"), ("fp4", "U8"), ("int8", "I8")]
)
def test_bitsandbytes_weights_of_another_kind_than_the_settings_say_are_refused(
    said: str, stored: str, storage: str
) -> None:
    settings: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": said}
    if said == "int8":
        settings = {"load_in_8bit": True, "load_in_4bit": False, "bnb_4bit_quant_type": "fp4"}
    settings["quant_method"] = "bitsandbytes"
    pieces: dict[str, tuple[Any, ...]] = {"weight": (storage, 64, 1)}
    pieces[f"weight.quant_state.bitsandbytes__{stored}"] = ("U8", 80)
    if stored == "int8":
        pieces = {"weight": (storage, 8, 8), "SCB": ("F32", 8), "weight_format": ("U8",)}
    weights = weights_of({f"layers.0.up_proj.{name}": piece for name, piece in pieces.items()})
    words = f"say {said} of bits.*up_proj.* belongs to {stored}: "
    with contextlib.nullcontext() if stored == said else pytest.raises(ConfigError, match=words):
        check_stored(detect(settings, "config.json"), settings, weights, Path("model"))


@pytest.mark.parametrize(
    ("name", "machine", "is_refused"),
    [
        ("nf4", CPU, True),
        ("nf4", H200, True),
        ("int8", CPU, True),
        ("int4", CPU, True),
        ("int8", H200, False),
        ("fp8", H200, False),
        ("none", CPU, False),
    ],
)
def test_experts_that_cannot_be_quantized_are_refused_before_they_are_loaded(
    folder: Path, name: str, machine: Machine, is_refused: bool
) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"mlp.up_proj", b".experts.0."))
    if not is_refused:
        assert read_model(str(folder), quantization=name, machine=machine).quantization == name
        return
    with pytest.raises(ConfigError, match=f"{name} cannot run .* has experts, .* can run as none"):
        read_model(str(folder), quantization=name, machine=machine)


def test_a_folders_name_is_a_hint_that_the_files_must_bear_out(folder: Path) -> None:
    hinted = folder.rename(folder.parent / "Demo-7M-AWQ")
    with pytest.raises(ConfigError, match="Demo-7M-AWQ says awq, but its files are unquantized"):
        read_model(str(hinted))
    assert read_model(str(hinted), quantization="none").quantization == "none"


def test_gguf_is_recognized_by_its_first_bytes(folder: Path) -> None:
    file = folder / "model.Q4_K_M.gguf"
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    file.write_bytes(b"GGUF" + bytes(64))
    for path in (file, folder):
        with pytest.raises(ConfigError, match=f"{file} is of version 0 of the GGUF format"):
            read_model(str(path))


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 8192),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 2048),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, 4096),
        ({"max_position_embeddings": 1024}, 1024),
        ({"max_position_embeddings": None, "n_positions": 512}, 512),
        ({"max_position_embeddings": 4096}, 2048),  # the tokenizer's
    ],
)
def test_the_context_length_is_derived_as_vllm_does(
    folder: Path, settings: dict[str, Any], found: int
) -> None:
    change(folder / "config.json", **settings)
    assert read_model(str(folder)).max_model_len == found


def test_a_longer_context_than_the_models_is_refused_with_both_numbers(folder: Path) -> None:
    assert read_model(str(folder), max_model_len=100).max_model_len == 100
    with pytest.raises(ConfigError, match=r"4096 .* 2048"):
        read_model(str(folder), max_model_len=4096)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # transformers' own, of its imports
@pytest.mark.parametrize(
    ("config", "found"),
    [  # numbers of keys and values of a token in all layers
        ({"model_type": "gpt2", "n_embd": 256, "n_head": 4, "n_layer": 3}, 2 * 3 * 256),
        ({"model_type": "bloom", "hidden_size": 256, "n_head": 4, "n_layer": 3}, 2 * 3 * 256),
        ({"model_type": "mamba", "hidden_size": 256, "num_hidden_layers": 3}, 2 * 3 * 256),
    ],
)
def test_sizes_are_read_under_the_names_of_the_models_own_class(
    tmp_path: Path, config: dict[str, Any], found: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 4096}))
    shape = shape_of(text_config(config | {"vocab_size": 4096}, tmp_path))
    assert kv_bytes_per_token(shape, "bfloat16", "auto") == 2 * found


def test_a_nested_text_config_is_read(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    nested = {"model_type": "x", "vocab_size": 1, "text_config": config}
    (folder / "config.json").write_text(json.dumps(nested))
    assert read_model(str(folder)).vocab_size == 4096


def test_settings_that_config_json_leaves_out_are_its_class_defaults(folder: Path) -> None:
    change(folder / "config.json", vocab_size=None)
    assert read_model(str(folder)).vocab_size == 32000  # LlamaConfig's
    change(folder / "config.json", model_type="no-such-model")
    with pytest.raises(ConfigError, match="vocab_size"):
        read_model(str(folder))


def test_code_that_comes_with_a_model_is_not_asked_about(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    code = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    change(folder / "config.json", model_type="no-such", auto_map=code, architectures=None)
    with pytest.raises(ConfigError, match=r"cannot be quantized here: .*custom code"):
        linear_layers(folder, {"model.layers.0.mlp.up_proj.weight": (1024, 256)})
    change(folder / "config.json", vocab_size=None)
    with pytest.raises(ConfigError, match="has no vocab_size"):
        read_model(str(folder))


def test_several_eos_tokens_are_kept(folder: Path) -> None:
    change(folder / "generation_config.json", eos_token_id=[2, 5])
    assert read_model(str(folder)).eos_token_ids == (2, 5)
    (folder / "generation_config.json").unlink()
    assert read_model(str(folder)).eos_token_ids == (2,)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=r"safetensors" if "model" in name else name):
        read_model(str(folder))


def test_weights_are_not_looked_at_when_none_are_needed(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    facts = read_model(str(folder), needs_weights=False)
    assert facts.weights_bytes == 0
    assert "weights" not in facts.digest


@pytest.mark.parametrize("num_bytes", [0, 5, 100, 1_000_000])
def test_truncated_weights_are_refused_with_their_name(folder: Path, num_bytes: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(ConfigError, match="copy it again") as caught:
        read_model(str(folder))
    assert str(file) in str(caught.value)


def test_an_invalid_header_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes((16).to_bytes(8, "little") + b"[1, 2, 3] and so" + bytes(64))
    with pytest.raises(ConfigError, match="no valid safetensors header"):
        read_model(str(folder))


def test_a_missing_part_of_sharded_weights_is_named(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"1 of 2 weight files.*model-2\.safetensors"):
        read_model(str(folder))


@pytest.mark.parametrize("weight_map", [[1], {"a": 3}, {"a": ""}, "x", None])
def test_an_index_that_names_no_files_is_refused(folder: Path, weight_map: Any) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConfigError, match=r"index\.json: weight_map must name a file"):
        read_model(str(folder))


@pytest.mark.parametrize(
    ("file", "settings", "words"),
    [
        ("config.json", {"head_dim": "64"}, "head_dim is '64', not a whole number"),
        ("config.json", {"head_dim": 64.0}, r"head_dim is 64\.0"),
        ("config.json", {"num_key_value_heads": [2, "2"]}, "num_key_value_heads is "),
        ("config.json", {"intermediate_size": "wide"}, "intermediate_size is 'wide'"),
        ("config.json", {"num_experts_per_tok": {}}, "num_experts_per_tok is {}"),
        ("config.json", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("config.json", {"vocab_size": [4096]}, r"vocab_size is \[4096\]"),
        ("config.json", {"rope_parameters": {"rope_type": "linear", "factor": "4"}}, "factor '4'"),
        ("config.json", {"vocab_size": None, "hidden_act": 3}, "has no vocab_size"),
        ("generation_config.json", {"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ("generation_config.json", {"eos_token_id": [2, [5]]}, r"eos_token_id is \[2, \[5\]\]"),
    ],
)
def test_a_setting_of_another_type_is_named(
    folder: Path, file: str, settings: dict[str, Any], words: str
) -> None:
    change(folder / file, **settings)
    with pytest.raises(ConfigError, match=words):
        read_model(str(folder))


def test_sizes_may_be_given_for_each_layer(folder: Path) -> None:
    change(folder / "config.json", num_key_value_heads=[1, 2, 2, 2, 2, 2], intermediate_size=[64])
    assert read_model(str(folder)).kv_bytes_per_token == 2 * 6 * 2 * 64 * 2


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("s3://bucket/model", "Download it first"),
        ("no/such/folder", "there is no folder"),
        ("nothing-here", "there is no folder"),
        (str(DEMO / "config.json"), "is a file"),
        ("nothing.gguf", "there is no file"),
        ("/dev/null", "neither a folder nor a regular file"),
    ],
)
def test_a_path_that_is_not_a_folder_is_refused(path: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        batchinfer.model.read_model(ModelSettings.model_construct(path=path))


def test_a_hub_name_without_network_is_refused_with_a_sentence() -> None:
    program = (
        "import sys\nfrom batchinfer.errors import ConfigError\n"
        "from batchinfer.config import ModelSettings\n"
        "from batchinfer.model import read_model\n"
        "try:\n    read_model(ModelSettings(path='some-org/some-model'))\n"
        "except ConfigError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "some-org/some-model" in done.stdout
    assert "local folder" in done.stdout


def test_broken_json_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        read_model(str(folder))
