"""The walk through a bit-shift trellis that is nearest to a tile of weights: Viterbi's search.

A state is L bits, a step shifts K V fresh ones in and stands for V weights. Walks are tail-biting:
the last state's low L - K V bits are the first one's high ones. As in the paper that takes two
passes: one without that condition, over the tile rotated by half, finds the bits across the seam;
the second keeps to them. The C++ of kernels/cpu/viterbi.cpp does 70,000 weights a second on one
core with AVX2 (2 bits), torch some thousands. Must not know: codes, layers, files.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from batchinfer.native import NotCompiled, compiled, instruction_flags

logger = logging.getLogger("batchinfer.making")

#: Tiles float32 [n, T], finite -> states int32 [n, T / V].
Search = Callable[[Tensor], Tensor]

_SOURCE = "cpu/viterbi.cpp"
_ALIGNMENT = 64
#: Floats that a step of the search in torch holds for one operand. A GPU wants many.
_FLOATS_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 25}


def search_on_cpu(
    table: Tensor, num_bits: int, cpu_flags: frozenset[str], libraries: Path
) -> Search:
    """A search of tiles in the code of `table`, float [2^L, V], with `num_bits` (K) a weight.

    `libraries`: the folder of what is compiled here; without a compiler torch searches.
    """
    try:
        return NativeSearch(
            table, num_bits, compiled(_SOURCE, instruction_flags(cpu_flags), libraries)
        )
    except (NotCompiled, OSError) as error:  # OSError: a library of another system
        logger.warning("torch searches instead of our C++, about ten times slower: %s", error)
        return TorchSearch(table, num_bits)


class NativeSearch:
    """By the C++ library, on all CPUs that this process may use."""

    def __init__(
        self, table: Tensor, num_bits: int, library: Path, num_threads: int | None = None
    ) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.viterbi_memory_floats.restype = ctypes.c_int64
        self._table = table.float().contiguous()
        self._state_bits = len(table).bit_length() - 1
        self._step_bits = num_bits * table.shape[1]
        self._num_threads = num_threads or len(os.sched_getaffinity(0))
        self._memory = torch.empty(0)

    def __call__(self, tiles: Tensor) -> Tensor:
        num_values = self._table.shape[1]
        num_tiles, num_steps = tiles.shape[0], tiles.shape[1] // num_values
        wanted = tiles.float().contiguous()
        states = torch.empty(num_tiles, num_steps, dtype=torch.uint16)
        if not num_tiles:
            return states.int()
        failed = self._library.viterbi_encode(
            ctypes.c_void_p(wanted.data_ptr()),
            ctypes.c_int64(num_tiles),
            num_steps,
            ctypes.c_void_p(self._table.data_ptr()),
            self._state_bits,
            self._step_bits,
            num_values,
            ctypes.c_void_p(states.data_ptr()),
            ctypes.c_void_p(self._aligned(num_steps)),
            self._num_threads,
        )
        assert not failed, f"no code: {self._table.shape}, {self._step_bits} bits a step"
        return states.int()

    def _aligned(self, num_steps: int) -> int:
        """Working memory, kept for the next call: fresh pages would cost as much as the search."""
        num_floats = self._library.viterbi_memory_floats(
            self._state_bits, self._step_bits, num_steps, self._num_threads
        )
        if len(self._memory) < num_floats + _ALIGNMENT // 4:
            self._memory = torch.empty(num_floats + _ALIGNMENT // 4)
        address: int = self._memory.data_ptr()
        return address + -address % _ALIGNMENT


class TorchSearch:
    """The same in torch, on the device of the tiles."""

    def __init__(self, table: Tensor, num_bits: int) -> None:
        self._table = table.float()
        self._step_bits = num_bits * table.shape[1]
        self._num_high = 1 << self._step_bits
        self._num_low = len(table) >> self._step_bits

    def __call__(self, tiles: Tensor) -> Tensor:
        table = self._table.to(tiles.device)
        at_once = max(1, _FLOATS_AT_ONCE[tiles.device.type] // len(table))
        found = [self._search(part, table) for part in tiles.float().split(at_once)]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int32)

    def _search(self, tiles: Tensor, table: Tensor) -> Tensor:
        steps = tiles.unflatten(1, (-1, table.shape[1]))  # [n, steps, V]
        half = steps.shape[1] // 2
        rest = steps.shape[1] - half
        free = torch.zeros(len(tiles), self._num_low, device=tiles.device)
        least, chosen = self._run(steps.roll(-half, 1), table, free)
        seam = self._back(least.argmin(1), chosen)[:, rest] >> self._step_bits
        fixed = torch.full_like(free, torch.inf).scatter_(1, seam[:, None], 0.0)
        _, chosen = self._run(steps, table, fixed)
        return self._back(seam, chosen).int()

    def _run(self, steps: Tensor, table: Tensor, least: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The least cost of each low part of a state after the last step, [n, 2^(L - K V)].

        And for each step the high part of the best state for each low part.
        """
        chosen = []
        kept_as = torch.uint8 if self._step_bits <= 8 else torch.int32
        for wanted in steps.unbind(1):
            cost = (table[:, 0] - wanted[:, 0, None]) ** 2
            for value in range(1, table.shape[1]):
                cost += (table[:, value] - wanted[:, value, None]) ** 2
            cost += least.repeat_interleave(self._num_high, 1)
            least, high = cost.view(-1, self._num_high, self._num_low).min(1)
            chosen.append(high.to(kept_as))
        return least, chosen

    def _back(self, low: Tensor, chosen: list[Tensor]) -> Tensor:
        """The states that end with the low parts [n]: int64 [n, steps]."""
        states = []
        for high in reversed(chosen):
            best = high.gather(1, low[:, None])[:, 0].long()
            states.append(best * self._num_low + low)
            low = states[-1] >> self._step_bits
        return torch.stack(states[::-1], 1)
