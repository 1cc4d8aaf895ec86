"""What really computes the loaded model's layers: quantization methods and kernels, counted.

Several of vLLM's quantization names load a model and leave every layer unquantized without a word.
Must not know: which name was asked for. Works in our process and in vLLM's workers alike: vLLM
mixes `LayerReport` into its worker class (engine argument `worker_extension_cls`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from batchinfer.errors import ConfigError

EXTENSION = f"{__name__}.LayerReport"


class LayerReport:
    """Adds to a vLLM worker what this room asks of it."""

    get_model: Any  # the worker's own

    def report_layers(self) -> dict[str, Any]:
        """Counts over the layers that can be quantized: linear layers and experts.

        `weights_bytes` are those of all the model's parameters here, each tensor once.
        """
        methods: Counter[str] = Counter()
        kernels: Counter[str] = Counter()
        num_quantized = 0
        for parts in _layers(self.get_model()):
            names = [type(part).__name__ for part in parts]
            methods["/".join(names)] += 1
            num_quantized += not names[0].startswith("Unquantized")
            kernels.update({_class_name(k) for part in parts for k in vars(part).values()} - {""})
        return {
            "num_quantized_layers": num_quantized,
            "num_layers": methods.total(),
            "weights_bytes": sum(p.nbytes for p in self.get_model().parameters()),
            "methods": dict(methods),
            "kernels": dict(kernels),
        }


def _layers(model: Any) -> Iterator[list[Any]]:
    """Its method, and its scheme where compressed-tensors has given it one, of each layer."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        method = getattr(module, "quant_method", None)
        # Embeddings stay as they are, and attention's methods are about its cache.
        if method is None or isinstance(module, VocabParallelEmbedding):
            continue
        if "KVCache" in type(method).__name__:
            continue
        scheme = getattr(module, "scheme", None)
        yield [method] if scheme is None else [method, scheme]


def _class_name(value: object) -> str:
    name = type(value).__name__
    return name if "Kernel" in name else ""


def quantized_layers(core: Any, asked: str | None) -> dict[str, Any]:
    """The report of a loaded engine. `asked`: the quantization that vLLM loaded it with.

    Raises ConfigError if that quantized nothing.
    """
    report: dict[str, Any] = core.collective_rpc("report_layers")[0]
    if asked is not None and not report["num_quantized_layers"]:
        raise ConfigError(
            f"vLLM accepted the quantization {asked} and quantized none of the model's "
            f"{report['num_layers']} layers ({', '.join(report['methods'])}): write "
            "model.quantization: none, or give another checkpoint"
        )
    return report
