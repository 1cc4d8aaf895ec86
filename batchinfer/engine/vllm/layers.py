"""What really computes the loaded model's layers: quantization methods and kernels, counted.

Several of vLLM's quantization names load a model and leave every layer unquantized without a word.
Must not know: which name was asked for. Works in our process and in vLLM's workers alike: vLLM
mixes `LayerReport` into its worker class (engine argument `worker_extension_cls`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from batchinfer.engine.vllm.settings import VllmSettings
from batchinfer.errors import ConfigError

EXTENSION = f"{__name__}.LayerReport"


class LayerReport:
    """Adds to a vLLM worker what this room asks of it."""

    get_model: Any  # the worker's own
    model_runner: Any

    def report_layers(self) -> dict[str, Any]:
        """Counts over the layers that can be quantized: linear layers and experts.

        Of this worker: one stage of the pipeline, and of each layer in it this worker's part.
        """
        from vllm.distributed import get_pp_group

        model = self.get_model()
        methods: Counter[str] = Counter()
        kernels: Counter[str] = Counter()
        num_quantized = 0
        for parts in _layers(model):
            names = [type(part).__name__ for part in parts]
            methods["/".join(names)] += 1
            num_quantized += not names[0].startswith("Unquantized")
            kernels.update({_class_name(k) for part in parts for k in vars(part).values()} - {""})
        return {
            "stage": get_pp_group().rank_in_group,
            "num_quantized_layers": num_quantized,
            "num_layers": methods.total(),
            "methods": dict(methods),
            "kernels": dict(kernels),
            "weights_bytes": weights_bytes(model),
            # As measured by vLLM while loading, on a GPU: less where weights stay with the host.
            "device_bytes": getattr(self.model_runner, "model_memory_usage", None),
            "peak_bytes": peak_bytes(self),
        }


def peak_bytes(worker: Any) -> int | None:
    """What vLLM measured on a GPU before it made the KV cache: weights, what the driver and its
    libraries hold, and the activations of the largest step. None on a CPU, where it measures none.
    """
    activations = getattr(worker, "peak_activation_memory", None)
    if activations is None:
        return None
    held = getattr(worker, "total_consumed", None)
    if held is None:  # before vLLM 0.32
        held = worker.model_runner.model_memory_usage + getattr(worker, "non_torch_memory", 0)
    return int(held + activations)


def _layers(model: Any) -> Iterator[list[Any]]:
    """Its method, and its scheme where compressed-tensors has given it one, of each layer."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        method = getattr(module, "quant_method", None)
        # Embeddings stay as they are, and attention's methods are about its cache. What wraps a
        # layer for an adapter has the layer's own method.
        if method is None or isinstance(module, VocabParallelEmbedding):
            continue
        if hasattr(module, "base_layer"):
            continue
        if "KVCache" in type(method).__name__:
            continue
        scheme = getattr(module, "scheme", None)
        yield [method] if scheme is None else [method, scheme]


def weights_bytes(model: Any) -> int:
    """Bytes of the model loaded in this worker: its parameters, and what kernels hold instead.

    A CPU's kernels take a weight over, packed, and leave an empty parameter or none behind.
    """
    from vllm.model_executor.layers.linear import LinearBase

    total = sum(p.numel() * p.element_size() for p in model.parameters())
    for module in model.modules():
        if isinstance(module, LinearBase) and "weight" in vars(module)["_parameters"]:
            weight = module.weight
            if weight is None:  # of 8-bit integers
                total += _num_weights(module)
            elif not weight.numel():
                total += _num_weights(module) * weight.element_size()
    return int(total)


def _num_weights(linear: Any) -> int:
    """In this worker. Layers that are replicated in all of them do not report their part."""
    num_in = getattr(linear, "input_size_per_partition", linear.input_size)
    num_out = getattr(linear, "output_size_per_partition", linear.output_size)
    return int(num_in * num_out)


def _class_name(value: object) -> str:
    name = type(value).__name__
    return name if "Kernel" in name else ""


def quantized_layers(core: Any, settings: VllmSettings) -> dict[str, Any]:
    """The report of a loaded engine. ConfigError if it had to be quantized and nothing of it is."""
    taken = core.vllm_config.model_config.quantization
    return checked_layers(core.collective_rpc("report_layers"), taken, settings)


def checked_layers(
    reports: Sequence[dict[str, Any]], taken: str | None, settings: VllmSettings
) -> dict[str, Any]:
    """As `quantized_layers`, of the workers' reports. `taken`: the quantization that vLLM chose."""
    report = whole_model(reports)
    is_meant = settings.is_quantized and taken is not None  # else it says how the cache is kept
    if is_meant and not report["num_quantized_layers"]:
        advice = "write model.quantization: none"
        if settings.quantization is None:  # none would contradict config.json
            advice = "if its weights are unquantized, remove quantization_config from config.json"
        raise ConfigError(
            f"vLLM accepted the quantization {taken} and quantized none of the model's "
            f"{report['num_layers']} layers ({', '.join(report['methods'])}): {advice}, or give "
            "another checkpoint"
        )
    return report


def whole_model(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """From the reports of all workers: the sum over the stages, each by one of those that share it.

    Workers that share a stage (tensor parallel) have parts of the same layers.
    """
    whole, *others = {report["stage"]: report for report in reversed(reports)}.values()
    whole = {name: value for name, value in whole.items() if name != "stage"}
    for report in others:
        for name, value in whole.items():
            if isinstance(value, dict):
                whole[name] = dict(Counter(value) + Counter(report[name]))
            elif value is not None:
                whole[name] = value + report[name]
    return whole


def check_moved(report: dict[str, Any], cpu_offload_gib: float) -> None:
    """Raise ConfigError unless the weights that should stay with the host are not on the GPU."""
    if not cpu_offload_gib:
        return
    wanted = min(cpu_offload_gib * (1 << 30), report["weights_bytes"])
    moved = report["weights_bytes"] - (report["device_bytes"] or 0)
    if report["device_bytes"] is None or moved < wanted / 2:
        raise ConfigError(
            f"model.cpu_offload_gib is {cpu_offload_gib:g}, and vLLM left {moved / 1e9:.2f} of "
            f"{report['weights_bytes'] / 1e9:.2f} GB of weights on the host: it does not move "
            "weights of this model or quantization, leave the setting out"
        )
