"""GGUF files made here: what llama.cpp computes of them, beside transformers on the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from batchinfer.errors import ConfigError
from batchinfer.prompt.gguf_encoder import GgufEncoder
from batchinfer.quantization import read_gguf
from tests.support.gguf import complete, make_gguf, running
from tests.support.jobs import MODEL, ROOT

pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 512, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3's rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {}),
}


def random_model(folder: Path, kind: str, settings: dict[str, Any]) -> Any:
    """A model of that class with random weights and the demo's tokenizer, in float32."""
    import torch
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **settings})
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "bias" in name:
                weight.add_(0.3 * torch.randn_like(weight))
            else:
                weight.mul_(4.0)  # of flat attention no error would be seen
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL / name, folder / name)
    return model


@pytest.mark.parametrize("family", list(FAMILIES))
def test_llama_cpp_computes_what_transformers_does(family: str, tmp_path: Path) -> None:
    """At every position of a text that is longer than llama 3's rope was first trained for."""
    import torch

    model = random_model(tmp_path / "model", *FAMILIES[family])
    make_gguf(tmp_path / "model", tmp_path / "model.gguf")
    token_ids = np.random.default_rng(1).integers(3, 4096, 200).tolist()
    with torch.inference_mode():
        logits = model(torch.tensor([token_ids])).logits[0].double()
    expected = torch.log_softmax(logits, -1)[range(199), token_ids[1:]].numpy()
    sampling = {"max_tokens": 1, "prompt_logprobs": True}
    with running(tmp_path / "model.gguf", sampling=sampling) as llama:
        (done,) = complete(llama, token_ids)
    assert np.abs(np.asarray(done.prompt_token_logprobs)[1:] - expected).max() < 2e-3
    assert done.token_ids[0] == int(logits[-1].argmax())


@pytest.mark.parametrize(("kind", "most"), [("f16", 0.05), ("bf16", 0.1), ("q8_0", 0.3)])
def test_smaller_types_are_near_the_model(
    kind: str, most: float, demo_gguf: Path, tmp_path: Path
) -> None:
    made = make_gguf(MODEL, tmp_path / "small.gguf", kind)
    types = {tensor.dtype for tensor in read_gguf(tmp_path / "small.gguf").tensors.values()}
    assert types == {kind.upper(), "F32"}, "norms stay in float32"
    assert made.num_quantized == (made.num_linear if kind == "q8_0" else 0)
    token_ids = list(range(100, 180))
    found = []
    for file in (demo_gguf, tmp_path / "small.gguf"):
        with running(file, sampling={"max_tokens": 1, "prompt_logprobs": True}) as llama:
            (done,) = complete(llama, token_ids)
        found.append(np.asarray(done.prompt_token_logprobs)[1:])
    difference = np.abs(found[0] - found[1])
    assert 0 < difference.mean() < most


def change(file: Path, **settings: Any) -> None:
    content = json.loads(file.read_text()) | settings
    file.write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


@pytest.mark.parametrize("way", ["files", "settings", "processor"])
def test_a_file_has_all_chat_templates_of_the_model_by_their_names(
    way: str, folder: Path, tmp_path: Path
) -> None:
    """And twice the same bytes."""
    texts = {"default": "D{{ messages[0].content }}", "chatml": "C", "tool_use": "T"}
    (folder / "chat_template.jinja").unlink()
    match way:
        case "files":
            (folder / "additional_chat_templates").mkdir()
            for name, text in texts.items():
                file = "chat_template" if name == "default" else f"additional_chat_templates/{name}"
                (folder / f"{file}.jinja").write_text(text)
        case "settings":
            entries = [{"name": name, "template": text} for name, text in texts.items()]
            change(folder / "tokenizer_config.json", chat_template=entries)
        case "processor":
            texts = {"default": "D"}
            (folder / "chat_template.json").write_text('{"chat_template": "D"}')
    for name in ("a.gguf", "b.gguf"):
        make_gguf(folder, tmp_path / name)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    tokenizer = GgufEncoder(str(tmp_path / "a.gguf")).tokenizer
    assert tokenizer.get_chat_template(None) == texts["default"]
    assert {name: tokenizer.get_chat_template(name) for name in texts if len(texts) > 1} == (
        texts if len(texts) > 1 else {}
    )
    tools = [{"type": "function"}]
    assert tokenizer.get_chat_template(None, tools) == texts.get("tool_use", "D")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not converted to GGUF here"),
        ({"hidden_act": "gelu"}, "hidden_act gelu is not converted"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not converted"),
        (
            {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
            "rope of type longrope is not converted",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    settings: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    change(folder / "config.json", **settings)
    with pytest.raises(ConfigError, match=words):
        make_gguf(folder, tmp_path / "x.gguf")


def test_a_tokenizer_with_another_rule_is_refused(folder: Path, tmp_path: Path) -> None:
    change(
        folder / "tokenizer.json",
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    )
    with pytest.raises(ConfigError, match="its rule for splitting texts is not one of those known"):
        make_gguf(folder, tmp_path / "x.gguf")


def sentencepiece_like(folder: Path, texts: list[str]) -> Any:
    """A tokenizer of Llama 2's kind: words with their space in front, bytes for what is unknown."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trained.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trained.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=900, special_tokens=["<unk>", "<s>", "</s>", *of_bytes],
            show_progress=False, limit_alphabet=90,
        ),
    )  # fmt: skip
    content = json.loads(trained.to_str())
    content["model"] |= {"byte_fallback": True, "fuse_unk": True}
    added = content["added_tokens"]
    content["added_tokens"] = [t for t in added if not t["content"].startswith("<0x")]
    steps = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    content |= {
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, text],
            "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return Tokenizer.from_str(json.dumps(content))


def test_a_tokenizer_of_llama_2s_kind_makes_the_same_tokens(tmp_path: Path) -> None:
    rows = pl.read_parquet(ROOT / "jobs/demo/prompts/*.parquet")["description"].to_list()
    model = tmp_path / "model"
    random_model(model, "Llama", {"vocab_size": 900, "bos_token_id": 1})
    theirs = sentencepiece_like(model, rows[:300])
    make_gguf(model, tmp_path / "model.gguf")
    encoder = GgufEncoder(str(tmp_path / "model.gguf"))
    texts = [*rows[:200], "", " a  b", "na\u00efve \u65e5\u672c \U0001f600\n\n x", "tab\there"]
    found = encoder.encode(texts, add_special_tokens=True)
    assert [ids.tolist() for ids in found] == [theirs.encode(text).ids for text in texts]
    for text, spans in zip(rows[:50], encoder.spans(rows[:50]), strict=True):
        expected = theirs.encode(text, add_special_tokens=False).offsets
        assert spans.tolist() == [list(span) for span in expected]
