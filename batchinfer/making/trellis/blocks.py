"""What flows through an unquantized model while its blocks are replaced, one after the other.

The model is transformers'. Its linear layers are in blocks (model.layers.0, ...) that are called
in turn; calibration tokens go through one block at a time, so that what later blocks are calibrated
with is what the quantized ones before them make of it. Must not know: how weights are coded.
Memory: the model in float32, and the hidden state of every calibration token; of a GPU the block
that is at work and one sequence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = re.compile(r"(.*?\.\d+)\.")


class _Reached(Exception):
    """The first block is called: what comes after is not computed."""


def blocks_of(layers: Iterable[str]) -> list[str]:
    """Names of the blocks that hold these layers, in the order in which they are called."""
    found = {match[1] for layer in layers if (match := _BLOCK.match(layer))}
    return sorted(found, key=lambda name: int(name.rpartition(".")[2]))


class Blocks:
    """`tokens`: int64 [sequences, tokens]. `device`: where a block is computed."""

    def __init__(
        self, folder: Path, names: list[str], tokens: Tensor, device: torch.device
    ) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        ).eval()
        self._names = names
        self._device = device
        self._arguments: dict[str, dict[str, Any]] = {}
        self._states: list[Tensor] = []  # of each sequence, before the block that comes next
        if len(tokens):
            with torch.inference_mode():
                self._see_arguments(tokens[:1])
                self._arguments = _moved(self._arguments, self._device)
                self._states = [self._first_state(row[None]) for row in tokens]

    def weight(self, layer: str) -> Tensor:
        """float32 [out, in], where blocks are computed."""
        weight: Tensor = self._model.get_submodule(layer).weight.detach()
        return weight.to(self._device)

    def moments(self, block: str, layers: Iterable[str]) -> dict[str, Tensor]:
        """E[x x'] of the inputs of some layers of the block that comes next: float32 [in, in]."""
        sums = {layer: _Moments() for layer in layers}
        hooks = [
            self._model.get_submodule(layer).register_forward_pre_hook(found.add)
            for layer, found in sums.items()
        ]
        try:
            for state in self._states:
                self._call(block, state.to(self._device))
        finally:
            for hook in hooks:
                hook.remove()
        return {layer: found.mean() for layer, found in sums.items() if found.num_tokens}

    def replace(self, block: str, weights: Mapping[str, Tensor]) -> None:
        """Put other weights in the block that comes next, and go through it."""
        for layer, weight in weights.items():
            self._model.get_submodule(layer).weight.data.copy_(weight)
        self._states = [self._call(block, state.to(self._device)).cpu() for state in self._states]
        self._model.get_submodule(block).cpu()

    def _call(self, block: str, state: Tensor) -> Tensor:
        module = self._model.get_submodule(block).to(self._device)
        with torch.inference_mode():
            found = module(state, **self._arguments[block])
        result: Tensor = found[0] if isinstance(found, tuple) else found
        return result

    def _see_arguments(self, tokens: Tensor) -> None:
        """What each block is called with beside the hidden state: of one length always the same."""
        hooks = []
        for name in self._names:

            def see(_: nn.Module, args: Any, kwargs: dict[str, Any], name: str = name) -> None:
                self._arguments[name] = {k: v for k, v in kwargs.items() if k != "hidden_states"}

            block = self._model.get_submodule(name)
            hooks.append(block.register_forward_pre_hook(see, with_kwargs=True))
        self._model(input_ids=tokens, use_cache=False)
        for hook in hooks:
            hook.remove()

    def _first_state(self, tokens: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def stop(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        block = self._model.get_submodule(self._names[0])
        hook = block.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._model(input_ids=tokens, use_cache=False)
        except _Reached:
            pass
        finally:
            hook.remove()
        return seen[0]


def _moved(found: Any, device: torch.device) -> Any:
    """Tensors of arguments, also those in tuples and dicts, on `device`."""
    if isinstance(found, Tensor):
        return found.to(device)
    if isinstance(found, dict):
        return {name: _moved(value, device) for name, value in found.items()}
    return tuple(_moved(value, device) for value in found) if isinstance(found, tuple) else found


class _Moments:
    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self.num_tokens = 0

    def add(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2).float()
        found = (rows.T @ rows).double()
        self._sum = found if self._sum is None else self._sum + found
        self.num_tokens += len(rows)

    def mean(self) -> Tensor:
        assert self._sum is not None
        return (self._sum / self.num_tokens).float()
