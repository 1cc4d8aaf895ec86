"""What several methods' records say of vLLM's kernels, in one place.

Measured with vLLM 0.32 on CPUs (AVX-512 with and without AMX, AVX2).
"""

#: Of vLLM's CPU kernels for experts of 8- and 4-bit integers.
EXPERT_FLAGS = ("amx_tile",)
#: In vLLM's libraries for AVX-512, not in that for AVX2.
INT4_KERNEL = "cpu_gemm_wna16"
#: In vLLM 0.32; 0.26 computes it on a GPU.
NO_ACT_ORDER = "vLLM computes groups of neighbouring inputs alone"
#: The package that vLLM reads such checkpoints with, and that ours are made by.
COMPRESSED = ("compressed-tensors",)


def quantize_command(recipe: str) -> str:
    return f"`batchinfer quantize MODEL OUT --method {recipe}`"
