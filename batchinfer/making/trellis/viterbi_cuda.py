"""The search of `viterbi` on a GPU of NVIDIA: kernels/cuda/viterbi.cu, through ctypes.

Where it cannot be, torch searches on the same GPU. Must not know: codes, layers, files.
"""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

import torch
from torch import Tensor

from batchinfer.making.trellis.viterbi import Search, TorchSearch
from batchinfer.native import CUDA, NotCompiled, compiled
from batchinfer.quantization.methods.qtip.trellis import TILE_WEIGHTS

logger = logging.getLogger("batchinfer.making")

SOURCE = "cuda/viterbi.cu"
_RESERVED_BYTES = 1 << 10  # of a block's shared memory, for the system and what the kernel declares


def search_on_gpu(table: Tensor, num_bits: int, libraries: Path) -> Search:
    """As `viterbi.search_on_cpu`, for tiles on the present GPU. `table`: float [65536, V]."""
    try:
        return CudaSearch(table, num_bits, compiled(SOURCE, flags_for_gpu(), libraries, CUDA))
    except (NotCompiled, OSError) as error:  # OSError: a library of another system
        logger.warning("torch searches instead of our kernel, about 30 times slower: %s", error)
        return TorchSearch(table, num_bits)


def flags_for_gpu() -> tuple[str, ...]:
    """For the compiler: the present GPU alone. Raises NotCompiled where it is not NVIDIA's."""
    if torch.version.hip:
        raise NotCompiled("the kernel is for GPUs of NVIDIA")
    major, minor = torch.cuda.get_device_capability()
    return (f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}",)


class CudaSearch:
    """On the GPU that is present when it is made.

    Raises NotCompiled for a code that the kernel does not search, that float16 does not hold, or
    that needs more shared memory than the GPU has.
    """

    def __init__(self, table: Tensor, num_bits: int, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.viterbi_scratch_bytes.restype = ctypes.c_int64
        self._library.viterbi_error.restype = ctypes.c_char_p
        self._num_values = table.shape[1]
        self._step_bits = num_bits * self._num_values
        if len(table) != 1 << 16 or not self._scratch_bytes(1):
            raise NotCompiled(
                f"it has no code of {num_bits} bits a weight and {self._num_values} weights a state"
            )
        if not torch.equal(table.half().to(table), table):
            raise NotCompiled("the code has weights that are not float16")
        gpu = torch.cuda.get_device_properties("cuda")
        needed = _RESERVED_BYTES + self._library.viterbi_shared_bytes(
            self._step_bits, self._num_values, TILE_WEIGHTS // self._num_values
        )
        if needed > gpu.shared_memory_per_block_optin:
            raise NotCompiled(
                f"it needs {needed:,} bytes of shared memory, and {gpu.name} has "
                f"{gpu.shared_memory_per_block_optin:,}"
            )
        self._table = table.half().contiguous().cuda()
        self._num_blocks = gpu.multi_processor_count

    def __call__(self, tiles: Tensor) -> Tensor:
        device = self._table.device
        num_tiles, num_steps = tiles.shape[0], tiles.shape[1] // self._num_values
        wanted = tiles.to(device, torch.float32).contiguous()
        states = torch.empty(num_tiles, num_steps, dtype=torch.int32, device=device)
        blocks = min(self._num_blocks, num_tiles)
        if not blocks:
            return states
        scratch = torch.empty(
            blocks * self._scratch_bytes(num_steps), dtype=torch.uint8, device=device
        )
        with torch.cuda.device(device):
            error = self._library.viterbi_search(
                ctypes.c_void_p(wanted.data_ptr()),
                ctypes.c_int64(num_tiles),
                num_steps,
                ctypes.c_void_p(self._table.data_ptr()),
                self._step_bits,
                self._num_values,
                ctypes.c_void_p(states.data_ptr()),
                ctypes.c_void_p(scratch.data_ptr()),
                blocks,
                ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream),
            )
        if error:
            message = self._library.viterbi_error(error).decode()
            raise RuntimeError(f"the search on the GPU: {message} (CUDA error {error})")
        return states

    def _scratch_bytes(self, num_steps: int) -> int:
        found: int = self._library.viterbi_scratch_bytes(
            self._step_bits, self._num_values, num_steps
        )
        return found
