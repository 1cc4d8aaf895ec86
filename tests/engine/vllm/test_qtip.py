"""What vLLM asks of the method for trellis codes, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.real_engine,
    pytest.mark.xdist_group("engine"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's and torch's own
]

SETTINGS: dict[str, Any] = {
    "quant_method": "qtip",
    "format_version": 1,
    "L": 16,
    "T": 256,
    "default": {"K": 2, "V": 1, "code": "mcg"},
    "modules": {},
}


def config_of(
    settings: dict[str, Any], coded: set[str] | None, plain: set[str] | None = None
) -> Any:
    from batchinfer.quantization.methods.qtip.vllm import QTIPConfig

    config = QTIPConfig.from_config(settings)
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    config.coded = frozenset(coded) if coded is not None else None
    config.plain = frozenset(plain or ())
    return config


def method_of(config: Any, prefix: str, layer_class: str = "ReplicatedLinear") -> str:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    found = getattr(linear, layer_class, None) or getattr(vocab_parallel_embedding, layer_class)
    layer = found.__new__(found)
    torch.nn.Module.__init__(layer)
    with set_current_vllm_config(VllmConfig()):
        return type(config.get_quant_method(layer, prefix)).__name__


def test_layers_that_the_headers_show_are_coded_and_no_others() -> None:
    coded = {f"a.{x}_proj" for x in "qkv"} | {"b.down_proj"}
    config = config_of(SETTINGS, coded, {"a.o_proj", "lm_head"})
    assert method_of(config, "a.qkv_proj") == "QTIPLinearMethod"
    assert method_of(config, "b.down_proj") == "QTIPLinearMethod"
    assert method_of(config, "a.o_proj") == "UnquantizedLinearMethod"
    assert method_of(config, "lm_head", "ParallelLMHead") == "NoneType"
    mixed = config_of(SETTINGS, {"a.q_proj", "a.k_proj"}, {"a.v_proj"})
    with pytest.raises(ValueError, match=r"a.q_proj, a.k_proj, a.v_proj some are coded and some"):
        method_of(mixed, "a.qkv_proj")
    lost = config_of(SETTINGS | {"modules": {"a.o_proj": {"K": 2, "code": "mcg"}}}, {"b.o_proj"})
    with pytest.raises(ValueError, match=r"says that a.o_proj is coded, .* no trellis of it"):
        method_of(lost, "a.o_proj")


def test_a_layer_that_no_block_has_is_refused_beside_coded_ones() -> None:
    """It was computed with whatever memory held."""
    coded = {f"model.layers.{n}.self_attn.{x}_proj" for n in range(3) for x in "qkv"}
    config = config_of(SETTINGS, coded)
    words = r"neither a trellis nor a weight of model.layers.0.self_attn.o_proj, .*copy it again"
    with pytest.raises(ValueError, match=words):
        method_of(config, "model.layers.0.self_attn.o_proj")
    # Where nothing beside it is coded, the model's own code may give it another name.
    assert method_of(config, "model.layers.0.mlp.down_proj") == "WatchedLinearMethod"
    fused = config_of(SETTINGS, {"a.o_proj"}, {"a.qkv_proj"})
    assert method_of(fused, "a.qkv_proj") == "UnquantizedLinearMethod"


def test_what_nothing_was_loaded_into_is_refused_once_all_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor import parameter

    from batchinfer.quantization.methods.qtip.vllm import (
        WatchedEmbeddingMethod,
        WatchedLinearMethod,
    )

    for name, number in (("rank", 0), ("world_size", 1)):
        monkeypatch.setattr(parameter, f"get_tensor_model_parallel_{name}", lambda n=number: n)
    for watched in (WatchedLinearMethod, WatchedEmbeddingMethod):
        layer = torch.nn.Module()
        with set_current_vllm_config(VllmConfig()):
            method = watched("a.o_proj")
            method.create_weights(layer, 32, [32, 32], 32, 64, torch.float32, weight_loader=None)
        layer.weight.data[:32] = 1.0
        with pytest.raises(ValueError, match=r"neither a trellis nor a weight of a\.o_proj"):
            method.process_weights_after_loading(layer)
        layer.weight.data[32:] = 1.0
        method.process_weights_after_loading(layer)


def test_an_embedding_that_was_not_loaded_is_refused_though_vllm_gives_it_no_name() -> None:
    from batchinfer.quantization.methods.qtip.vllm import WatchedEmbeddingMethod

    layer, method = torch.nn.Module(), WatchedEmbeddingMethod("")
    method.create_weights(layer, 32, [64], 32, 64, torch.float32)
    with pytest.raises(ValueError, match="neither a trellis nor a weight of the embedding"):
        method.process_weights_after_loading(layer)


def test_an_output_layer_that_is_not_stored_must_be_tied(monkeypatch: pytest.MonkeyPatch) -> None:
    from batchinfer.quantization.methods.qtip import vllm

    config = config_of(SETTINGS, {"a.o_proj"})
    assert method_of(config, "model.embed_tokens", "VocabParallelEmbedding") == (
        "WatchedEmbeddingMethod"
    )
    words = "neither a trellis nor a weight of lm_head, which does not share the embedding's"
    with pytest.raises(ValueError, match=words):
        method_of(config, "lm_head", "ParallelLMHead")
    monkeypatch.setattr(vllm, "_is_tied", lambda: True)
    assert method_of(config, "lm_head", "ParallelLMHead") == "WatchedEmbeddingMethod"


def test_without_headers_settings_say_what_is_coded() -> None:
    """As with `load_format: dummy`."""
    config = config_of(SETTINGS | {"modules": {"a.o_proj": {"unquantized": True}}}, None)
    assert method_of(config, "a.qkv_proj") == "QTIPLinearMethod"
    assert method_of(config, "a.o_proj") == "UnquantizedLinearMethod"
    assert method_of(config, "lm_head", "ParallelLMHead") == "NoneType"
    config = config_of({"quant_method": "exl3"}, None)
    assert method_of(config, "lm_head", "ParallelLMHead") == "QTIPLinearMethod"


def test_vllm_does_not_warn_of_the_types_that_parts_are_stored_as(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It said of nearly every tensor that it is loaded into one of int8."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.models.utils import AutoWeightsLoader

    from batchinfer.quantization.methods.qtip.loading import random_parts
    from batchinfer.quantization.methods.qtip.vllm import QTIPLinearMethod

    parts = random_parts(128, 128, {"K": 2, "code": "hyb"})
    parts |= {"svh": parts["svh"].float(), "mcg": torch.tensor(1, dtype=torch.int32)}
    parts |= {"su": torch.zeros(8, dtype=torch.int16), "had_in": torch.eye(1, dtype=torch.int8)}
    model = torch.nn.Module()
    with set_current_vllm_config(VllmConfig()):
        method = QTIPLinearMethod(config_of(SETTINGS, None), "model")
        method.create_weights(model, 128, [128], 128, 128, torch.float32)
        caplog.clear()
        loaded = AutoWeightsLoader(model).load_weights(parts.items())
    assert loaded == parts.keys() and model.pieces.tensors[0].keys() == parts.keys()
    assert not [record for record in caplog.records if "dtype" in record.getMessage()]


def test_experts_are_refused() -> None:
    class RoutedExperts(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match=r"a.experts: qtip codes linear layers, and this model"):
        config_of(SETTINGS, set()).get_quant_method(RoutedExperts(), "a.experts")


def test_a_coded_output_layer_is_untied_and_cannot_be_tied() -> None:
    from batchinfer.quantization.methods.qtip.vllm import EXL3Config, QTIPConfig, QTIPLinearMethod

    text = SimpleNamespace(tie_word_embeddings=True)
    model = SimpleNamespace(tie_word_embeddings=True, text_config=text)
    assert QTIPConfig.override_quantization_method(SETTINGS, None, hf_config=model) is None
    assert model.tie_word_embeddings, "its output layer is not coded"
    EXL3Config.override_quantization_method({"quant_method": "awq"}, None, hf_config=model)
    assert model.tie_word_embeddings, "it is another method's"
    EXL3Config.override_quantization_method({"quant_method": "exl3"}, None, hf_config=model)
    assert not model.tie_word_embeddings and not text.tie_word_embeddings
    method = QTIPLinearMethod.__new__(QTIPLinearMethod)
    method.prefix = "lm_head"
    with pytest.raises(ValueError, match=r"lm_head is coded and cannot be the embedding's weight"):
        method.tie_weights(torch.nn.Module(), torch.nn.Module())


def test_names_of_vllms_own_find_their_settings() -> None:
    """Models within models have other prefixes in vLLM than in the checkpoint."""
    from vllm.model_executor.models.utils import WeightsMapper

    said = {"model.language_model.a.o_proj": {"K": 3, "V": 1, "code": "mul1"}}
    config = config_of(SETTINGS | {"modules": said}, set(said))
    mapper = WeightsMapper(orig_to_new_prefix={"model.language_model.": "language_model.model."})
    config.apply_vllm_mapper(mapper)
    assert method_of(config, "language_model.model.a.o_proj") == "QTIPLinearMethod"
    assert config.settings["modules"]["language_model.model.a.o_proj"]["code"] == "mul1"
