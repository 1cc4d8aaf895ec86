"""bitsandbytes for vLLM, which has dropped its own: NF4 in flight; NF4, FP4 and 8-bit checkpoints.

Weight-only: what is multiplied is the dequantized weight.

A 4-bit weight is an index into 16 values, times the largest magnitude of its block: 64 weights of
the flattened matrix (QLoRA, Dettmers et al. 2023, section 3), 4.5 bits a weight. Block scales stay
in float32: quantizing them too (0.37 bits less) would cost a kernel in every layer of every step.
An 8-bit weight is an integer times its row's largest magnitude / 127 (LLM.int8(), Dettmers et al.
2022); activations are not quantized here, so results are closer to the unquantized model's.

Must not know: the rest of the package beyond a name, how checkpoints store packed weights. Works in
our process and in vLLM's workers, registered by `plugin`.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.nn import functional
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import ModelWeightParameter
from vllm.model_executor.utils import replace_parameter
from vllm.utils.torch_utils import set_default_torch_dtype

from batchinfer.quantization.methods.bitsandbytes.dequantize import (
    BLOCK_SIZE,
    dequantized,
    kernel_shape,
)
from batchinfer.quantization.methods.bitsandbytes.record import VLLM_NAME

#: Layers of mixtures of experts in vLLM 0.26 to 0.33: most of a model's weights, if it has them.
_EXPERTS = ("FusedMoE", "RoutedExperts")


@register_quantization_config(VLLM_NAME)
class BitsAndBytesConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM is not typed
    """What config.json says; by default NF4, made in flight."""

    def __init__(
        self,
        quant_type: str = "nf4",
        *,
        is_8bit: bool = False,
        is_checkpoint: bool = False,
        skipped: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.quant_type = quant_type
        self.is_8bit = is_8bit
        self.is_checkpoint = is_checkpoint
        self.skipped = frozenset(skipped)

    @classmethod
    def get_name(cls) -> str:
        return VLLM_NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BitsAndBytesConfig:
        return cls(
            config.get("bnb_4bit_quant_type", "fp4"),
            is_8bit=bool(config.get("load_in_8bit")),
            is_checkpoint=True,
            skipped=config.get("llm_int8_skip_modules") or (),
        )

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        is_bitsandbytes = hf_quant_cfg.get("quant_method") == "bitsandbytes"
        return VLLM_NAME if is_bitsandbytes and user_quant == VLLM_NAME else None

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Add vLLM's names of what is skipped. Its rules for prefixes end in a dot: so do we.

        Called for the model and for models within it: the checkpoint's names stay for the next.
        """
        renamed = hf_to_vllm_mapper.apply_list([f"{name}." for name in self.skipped])
        self.skipped |= {name.removesuffix(".") for name in renamed}

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> LinearMethodBase | None:
        if type(layer).__name__ in _EXPERTS:
            raise ValueError("bitsandbytes quantizes linear layers, and this model has experts")
        if not isinstance(layer, LinearBase):
            return None
        if self._is_skipped(prefix):
            return UnquantizedLinearMethod()
        return Bits8LinearMethod() if self.is_8bit else Bits4LinearMethod(self)

    def _is_skipped(self, prefix: str) -> bool:
        """A module is named by its last word, by its path, or by that of one above it."""
        *above, last = prefix.split(".")
        for name in self.packed_modules_mapping.get(last, [last]):
            words = [*above, name]
            paths = {".".join(words[:end]) for end in range(1, len(words) + 1)}
            if self.skipped & (paths | set(words)):
                return True
        return False


class _LinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Weights arrive unquantized and are quantized layer by layer, while the next are read."""

    uses_meta_device = True

    #: nf4, fp4 or int8.
    kind: str

    #: Of the weights that arrive; None: the model's. From a checkpoint they are dequantized into
    #: float32, out of which quantizing makes the checkpoint's own values again.
    dtype: torch.dtype | None = torch.float32

    #: Whether those values come in blocks, which no device may hold a part of.
    keeps_blocks = False

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        layer.has_cut_rows = input_size_per_partition != input_size
        pieces = [input_size_per_partition]  # weights that stay in one run
        if not layer.has_cut_rows:
            pieces = [num_out * input_size for num_out in output_partition_sizes]
        is_cut = pieces != [output_size * input_size]
        if self.keeps_blocks and is_cut and any(size % BLOCK_SIZE for size in pieces):
            raise ValueError(
                f"a layer of {output_size} x {input_size} weights would be cut within the "
                f"checkpoint's blocks of {BLOCK_SIZE}, {input_size_per_partition} inputs to a "
                "device: lower model.tensor_parallel_size, or give the unquantized model"
            )
        weight = ModelWeightParameter(
            data=torch.empty(
                sum(output_partition_sizes),
                input_size_per_partition,
                device="meta",
                dtype=self.dtype or params_dtype,
            ),
            input_dim=1,
            output_dim=0,
            weight_loader=extra_weight_attrs["weight_loader"],
        )
        layer.register_parameter("weight", weight)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        with set_default_torch_dtype(torch.float32):  # codes would be in that of the model
            self.quantize(layer, layer.weight.data.contiguous())
        layer._already_called_process_weights_after_loading = True

    @abstractmethod
    def quantize(self, layer: torch.nn.Module, weight: torch.Tensor) -> None:
        """Replace `layer.weight`. weight: [out, in]"""


class Bits4LinearMethod(_LinearMethod):
    """layer.weight: [out * in / 2] uint8, two weights each; layer.absmax: [out * in / 64]."""

    def __init__(self, config: BitsAndBytesConfig) -> None:
        import bitsandbytes  # noqa: F401  # registers its operators with torch

        self.kind = config.quant_type
        self.keeps_blocks = config.is_checkpoint
        if not config.is_checkpoint:
            self.dtype = None

    def quantize(self, layer: torch.nn.Module, weight: torch.Tensor) -> None:
        packed, absmax = torch.ops.bitsandbytes.quantize_4bit(
            weight, BLOCK_SIZE, self.kind, torch.uint8
        )
        layer.weight_shape = tuple(weight.shape)
        replace_parameter(layer, "weight", packed)
        replace_parameter(layer, "absmax", absmax)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        shape = layer.weight_shape
        weight = torch.ops.bitsandbytes.dequantize_4bit(
            layer.weight, layer.absmax, BLOCK_SIZE, self.kind, kernel_shape(shape), x.dtype
        )
        return functional.linear(x, weight.view(shape), bias)


class Bits8LinearMethod(_LinearMethod):
    """layer.weight: [out, in] int8; layer.scale: [out, 1] float32."""

    kind = "int8"

    def quantize(self, layer: torch.nn.Module, weight: torch.Tensor) -> None:
        scale = weight.abs().amax(dim=1, keepdim=True).float() / 127
        if layer.has_cut_rows:  # and the largest of a row may be another device's
            group = get_tp_group().device_group
            torch.distributed.all_reduce(scale, torch.distributed.ReduceOp.MAX, group=group)
        integers = (weight / scale.clamp_min(1e-30)).round().to(torch.int8)
        replace_parameter(layer, "weight", integers)
        replace_parameter(layer, "scale", scale)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight = (layer.weight * layer.scale).to(x.dtype)
        return functional.linear(x, weight, bias)


@register_model_loader(VLLM_NAME)
class BitsAndBytesLoader(DefaultModelLoader):  # type: ignore[misc]
    """Reads checkpoints that transformers wrote with bitsandbytes, dequantized into float32."""

    def __init__(self, load_config: Any) -> None:
        load_config = copy.copy(load_config)
        load_config.load_format = "auto"
        # Devices ask each other for scales (8 bits), so all have to read in the same order.
        load_config.model_loader_extra_config = {
            **load_config.model_loader_extra_config,
            "enable_multithread_load": False,
        }
        super().__init__(load_config)

    def get_all_weights(
        self, model_config: Any, model: torch.nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        methods = [getattr(module, "quant_method", None) for module in model.modules()]
        kind = next((m.kind for m in methods if isinstance(m, _LinearMethod)), "nf4")
        return dequantized(super().get_all_weights(model_config, model), kind)
