"""QTIP and EXL3 for vLLM: trellis-coded linear layers and output layers, weight-only.

vLLM knows a checkpoint by config.json's `quant_method`, so this runs in any vLLM that the package
is installed beside (entry point `vllm.general_plugins`). Which layers are coded, and with how many
bits, is read from the checkpoint's own headers. Layers that are decoded while they are loaded
(`decided`: most often a CPU's) are computed as any unquantized one, the others by `linear`. Must
not know: the rest of the package, how layers are decoded. Works with vLLM 0.26 to 0.33.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from batchinfer.quantization.methods.qtip.decided import (
    say_decoded,
    say_packed_on_cpu,
    why_decoded,
)
from batchinfer.quantization.methods.qtip.dense import Coded, dense
from batchinfer.quantization.methods.qtip.files import PARTS, format_of, layers_of
from batchinfer.quantization.methods.qtip.linear import backend_for, packed_of, run_linear
from batchinfer.quantization.methods.qtip.loading import (
    DTYPES,
    LayerPieces,
    Span,
    padded_rows,
    random_parts,
)
from batchinfer.quantization.methods.qtip.watched import Watched
from batchinfer.quantization.methods.qtip.which import has_alike, has_coded_head, is_coded, neither

#: Layers of mixtures of experts in vLLM 0.26 to 0.33.
_EXPERTS = ("FusedMoE", "RoutedExperts")


class QTIPConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM is not typed
    """What config.json says, and which layers the checkpoint's headers show to be coded."""

    name = "qtip"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.settings = dict(settings)
        self.coded: frozenset[str] | None = None  # None: no headers, all but the output layer
        self.plain: frozenset[str] = frozenset()  # modules with a weight that is stored as it is

    @classmethod
    def get_name(cls) -> str:
        return cls.name

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QTIPConfig:
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Nothing is overridden; but this is where vLLM shows the model's own settings.

        A coded output layer has weights of its own, whatever the unquantized model had.
        """
        if hf_quant_cfg.get("quant_method") == cls.name and has_coded_head(hf_quant_cfg):
            configs: list[Any] = [hf_config, getattr(hf_config, "text_config", None)]
            for config in configs:
                if getattr(config, "tie_word_embeddings", False):
                    config.tie_word_embeddings = False
        return None

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read the checkpoint's headers."""
        from vllm.transformers_utils.config import get_safetensors_params_metadata

        tensors = get_safetensors_params_metadata(model_name, revision=revision)
        self.coded = frozenset(layers_of(tensors)) if tensors else None
        weights = (name for name in tensors if name.endswith(".weight"))
        self.plain = frozenset(name.removesuffix(".weight") for name in weights)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Add vLLM's names of layers."""
        if self.coded is not None:
            self.coded |= _renamed(self.coded, hf_to_vllm_mapper)
            self.plain |= _renamed(self.plain, hf_to_vllm_mapper)
        modules = self.settings.get("modules", {})
        renamed = hf_to_vllm_mapper.apply_dict({f"{k}.": v for k, v in modules.items()})
        renamed = {name.removesuffix("."): said for name, said in renamed.items()}
        self.settings["modules"] = {**renamed, **modules}

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if type(layer).__name__ in _EXPERTS:
            raise ValueError(
                f"{prefix}: {self.name} codes linear layers, and this model has experts"
            )
        if not isinstance(layer, LinearBase | VocabParallelEmbedding):
            return None
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None if self._is_stored(prefix) else WatchedEmbeddingMethod(prefix)
        names = self.names_of(prefix)
        if self.coded is not None and prefix in self.plain:  # stored as the one that it is
            names = [prefix]
        are_coded = {is_coded(name, self.settings, self.coded, self.plain) for name in names}
        if len(are_coded) > 1:
            raise ValueError(
                f"{prefix}: of {', '.join(names)} some are coded and some are not, and vLLM "
                "computes them as one: quantize all of them, or none"
            )
        if are_coded.pop():
            return QTIPLinearMethod(self, prefix)
        is_stored = self._is_stored(prefix) or all(map(self._is_stored, names))
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod() if is_stored else WatchedLinearMethod(prefix)
        if is_stored:
            return None
        if not _is_tied() and not has_alike(prefix, {*(self.coded or ()), *self.plain}):
            raise ValueError(neither(prefix, "which does not share the embedding's weight"))
        return WatchedEmbeddingMethod(prefix)

    def _is_stored(self, name: str) -> bool:
        """Whether the checkpoint has it; as far as is known, without headers."""
        return self.coded is None or name in self.coded or name in self.plain

    def names_of(self, prefix: str) -> list[str]:
        """The checkpoint's layers that one of vLLM's holds, in order."""
        above, _, last = prefix.rpartition(".")
        names = self.packed_modules_mapping.get(last, [last])
        return [f"{above}.{name}".removeprefix(".") for name in names]


class EXL3Config(QTIPConfig):
    name = "exl3"


class QTIPLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """layer.pieces while tensors arrive; then layer.weight, or layer.packed and what it holds."""

    def __init__(self, config: QTIPConfig, prefix: str) -> None:
        self.config = config
        self.prefix = prefix
        self.is_dummy = get_current_vllm_config().load_config.load_format == "dummy"
        self.plain: Any = None  # the method of a layer that was decoded

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
        inputs = _inputs(layer, input_size, input_size_per_partition)
        outputs, layer.rows = _outputs(layer, output_partition_sizes)
        layer.pieces = LayerPieces(self.prefix, inputs, outputs)
        layer.dtype = params_dtype
        for part, dtype in DTYPES.items():  # of another one vLLM warns that it is converted
            parameter = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": partial(_load, layer, part)})
            layer.register_parameter(part, parameter)
        is_head = isinstance(layer, ParallelLMHead)
        self.plain = UnquantizedEmbeddingMethod() if is_head else UnquantizedLinearMethod()

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> Any:
        raise ValueError(
            f"{self.prefix} is coded and cannot be the embedding's weight too: set "
            "tie_word_embeddings to false in config.json, or leave the output layer unquantized"
        )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if layer.pieces is None:  # called once more
            return
        pieces: LayerPieces = layer.pieces
        shards = self._shards(pieces)
        device = layer.trellis.device
        for part in PARTS:
            delattr(layer, part)
        layer.pieces = None
        reason = why_decoded(
            shards, pieces, is_cpu=current_platform.is_cpu(), is_cut_within=layer.rows is not None
        )
        if reason is None:
            if device.type == "cpu":
                say_packed_on_cpu()
            packed = backend_for(device.type).pack([shard.to(device) for shard in shards])
            for number, tensor in enumerate(packed.tensors):
                # vLLM's adapters look for a parameter of this name.
                name = f"qweight_{number}" if number else "qweight"
                layer.register_parameter(name, Parameter(tensor, requires_grad=False))
            layer.plan, layer.num_tensors = packed.plan, len(packed.tensors)
            layer.num_out = packed.num_out
            self.plain = None
            return
        say_decoded(reason, layer.dtype)
        weights = []
        for shard, span in zip(shards, pieces.outputs, strict=True):
            weight = dense(shard.to(device), layer.dtype)
            weights.append(weight[: span.width, : pieces.inputs.width])
        whole = torch.cat(weights)
        if layer.rows is not None:
            whole = padded_rows(whole, layer.rows, layer.num_embeddings_per_partition)
        layer.register_parameter("weight", Parameter(whole.contiguous(), requires_grad=False))
        self.plain.process_weights_after_loading(layer)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.plain is not None:
            return self.plain.apply(layer, x, bias)
        y = run_linear(x, packed_of(layer))
        return y if bias is None else y + bias

    def dequantize_weight(self, layer: torch.nn.Module) -> torch.Tensor:
        """[out, in], in the dtype of the model."""
        if self.plain is not None:
            return layer.weight
        size = layer.input_size_per_partition
        identity = torch.eye(size, dtype=layer.dtype, device=layer.qweight.device)
        return run_linear(identity, packed_of(layer)).T

    def _shards(self, pieces: LayerPieces) -> list[Coded]:
        names = self.config.names_of(self.prefix)
        shards = []
        for index, parts in enumerate(pieces.tensors):
            name = names[index] if len(names) == len(pieces.tensors) else names[0]
            if self.is_dummy:
                settings = self.config.settings
                said = {**settings.get("default", {}), **settings.get("modules", {}).get(name, {})}
                width = pieces.inputs.width
                parts.update(random_parts(width, pieces.outputs[index].width, said))
            try:
                layer = format_of(self.config.settings, name, parts)
            except ValueError as error:
                raise ValueError(f"{name}: {error}: copy the checkpoint again") from error
            shards.append(pieces.coded(index, layer))
        return shards


class WatchedLinearMethod(Watched, UnquantizedLinearMethod):  # type: ignore[misc]
    pass


class WatchedEmbeddingMethod(Watched, UnquantizedEmbeddingMethod):  # type: ignore[misc]
    pass


def _is_tied() -> bool:
    """Whether the output layer may have the embedding's weight, as far as is known."""
    model = get_current_vllm_config().model_config
    configs = (getattr(model, "hf_config", None), getattr(model, "hf_text_config", None))
    return any(getattr(config, "tie_word_embeddings", False) for config in configs)


def _renamed(modules: frozenset[str], hf_to_vllm_mapper: Any) -> set[str]:
    """vLLM's names of modules. Its rules for prefixes end in a dot: so do we."""
    renamed = hf_to_vllm_mapper.apply_list([f"{name}." for name in modules])
    return {name.removesuffix(".") for name in renamed}


def _inputs(layer: Any, size: int, share: int) -> Span:
    is_cut = share != size and isinstance(layer, RowParallelLinear)
    first = layer.tp_rank * share if is_cut else 0
    return Span(size, first, first + share)


def _outputs(layer: Any, shares: list[int]) -> tuple[list[Span], Span | None]:
    """Outputs of each part, and of an output layer the rows that this device keeps of them.

    None where it keeps what it loads.
    """
    if isinstance(layer, ParallelLMHead):
        indices = layer.shard_indices
        rows = Span(
            layer.org_vocab_size, indices.org_vocab_start_index, indices.org_vocab_end_index
        )
        # Cut elsewhere than at a tile, it is loaded as a whole, decoded, and cut then.
        is_cut = rows.is_aligned and shares == [rows.width]
        whole = Span(rows.size, 0, rows.size)
        return ([rows], None) if is_cut else ([whole], rows)
    if not isinstance(layer, ColumnParallelLinear):
        return [Span(share, 0, share) for share in shares], None
    copies = [1] * len(shares)
    if isinstance(layer, QKVParallelLinear):
        copies[1:] = [layer.num_kv_head_replicas] * (len(shares) - 1)
    spans = []
    for share, num_copies in zip(shares, copies, strict=True):
        first = layer.tp_rank // num_copies * share
        spans.append(Span(share * layer.tp_size // num_copies, first, first + share))
    return spans, None


def _load(
    layer: Any, part: str, parameter: Parameter, tensor: torch.Tensor, shard_id: Any = None
) -> None:
    """vLLM's `weight_loader` of a part."""
    every = range(len(layer.pieces.outputs))
    if shard_id is None:
        indices = list(every)
    elif isinstance(shard_id, str):
        indices = ["qkv".index(shard_id)]
    else:
        indices = [shard_id] if isinstance(shard_id, int) else list(shard_id)
    layer.pieces.add(part, tensor, indices)


def register() -> None:
    """Make vLLM know both names. Entry point `vllm.general_plugins`; may be called again."""
    for config in (QTIPConfig, EXL3Config):
        register_quantization_config(config.name)(config)


register()
