"""On a GPU: what `batchinfer run` says, and how fast, where other processes hold the memory.

    python -m benchmarks.gpu_memory_held --log FILE [--parts held late large ...]

The other process takes memory by the driver alone, ends with its stdin and after five minutes at
the latest. The large model has the shape of Llama-3.1-8B and zeros for weights (16 GB in a file
without blocks, so its estimate is that of a real one). Prints a JSON line for each case and appends
it to --log; exits 1 if one ended otherwise than expected. Each run has a time limit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from batchinfer.engine.hardware import GIB, gpus
from benchmarks.common import DEMO, ROOT
from benchmarks.gpu import LLAMA_8B

RUN_S = 110.0
EAGER = "engine.options.enforce_eager=true"

#: Takes memory of a device: "take BYTES" at once, or "watch BYTES": all that is free and becomes
#: free, from when so many bytes are taken.
HOLD = """
import ctypes, signal, sys, threading, time
signal.alarm(300)
def end():
    sys.stdin.read()
    signal.raise_signal(signal.SIGKILL)
threading.Thread(target=end, daemon=True).start()
index, how, num_bytes = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
cuda = ctypes.CDLL("libcuda.so.1")
device, context, at = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
free, total = ctypes.c_size_t(), ctypes.c_size_t()
assert cuda.cuInit(0) == 0
assert cuda.cuDeviceGet(ctypes.byref(device), index) == 0
assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
assert cuda.cuCtxSetCurrent(context) == 0
def take(size):
    return cuda.cuMemAlloc_v2(ctypes.byref(at), ctypes.c_size_t(size)) == 0
if how == "take":
    assert take(num_bytes), "that much is not free"
    print("held", flush=True)
    time.sleep(300)
print("held", flush=True)
while True:
    cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    if total.value - free.value >= num_bytes:
        break
    time.sleep(0.01)
size = 1 << 32
while True:
    if not take(size):
        size = max(size >> 1, 1 << 21)
        time.sleep(0.005)
"""

Case = tuple[str, Callable[[], dict[str, Any]]]


@contextlib.contextmanager
def holder(how: str, num_bytes: int, index: int = 0) -> Iterator[int]:
    """Another process that takes memory of a device; its pid."""
    command = [sys.executable, "-c", HOLD, str(index), how, str(int(num_bytes))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            assert process.stdout.readline() == b"held\n", "the other process took no memory"
            yield process.pid
        finally:
            process.kill()
    time.sleep(1)  # the driver takes a moment to have it back


def write_zeros(folder: Path) -> Path:
    """A checkpoint of Llama-3.1-8B's shape whose weights are all zero and take no room on disk."""
    folder.mkdir()
    for file in (DEMO / "model").iterdir():
        if "tokenizer" in file.name or "template" in file.name:
            shutil.copy(file, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["model_max_length"] = 131072
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(LLAMA_8B | {"max_position_embeddings": 131072}))
    hidden, inner, kv, vocabulary = 4096, 14336, 1024, 128256
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{n}.{name}.weight": shape for n in range(32) for name, shape in layer.items()
    }
    shapes |= {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    shapes |= {"lm_head.weight": (vocabulary, hidden)}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)
    return folder


class Runs:
    """Starts `batchinfer run` on 8 rows of the demo's input, each into a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_runs = 0
        self.large = write_zeros(folder / "large")

    def run(self, *settings: str) -> dict[str, Any]:
        self._num_runs += 1
        output = self._folder / f"out{self._num_runs}"
        changes = [f"output.path={output}", "sampling.max_tokens=8", *settings]
        arguments = [part for change in changes for part in ("--set", change)]
        command = [sys.executable, "-m", "batchinfer", "run", "jobs/summarize.yaml"]
        begin_s = time.monotonic()
        ended = subprocess.run(
            [*command, "--limit", "8", *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=RUN_S,
            check=False,
        )
        line = ended.stdout.splitlines()[-1] if ended.stdout else "{}"
        found = json.loads(line)
        return {
            "code": ended.returncode,
            "seconds": round(time.monotonic() - begin_s, 1),
            "message": found.get("message", ended.stderr[-600:]),
            "warnings": found.get("warnings", []),
            "rows": found.get("rows"),
        }

    def run_large(self, *settings: str) -> dict[str, Any]:
        return self.run(f"model.path={self.large}", "model.max_model_len=8192", *settings)


def expect(found: dict[str, Any], codes: tuple[int, ...], *words: str) -> dict[str, Any]:
    missing = [word for word in words if found["code"] and not re.search(word, found["message"])]
    return found | {"ok": found["code"] in codes and not missing, "missing": missing}


def cases(runs: Runs) -> dict[str, list[Case]]:
    total = gpus()[0].total_bytes
    busy = int(total * 129 / 140)

    def held() -> dict[str, Any]:
        with holder("take", busy) as pid:
            return expect(runs.run_large(EAGER), (75,), "GPU 0", f"process {pid} |not shown", "GiB")

    def share() -> dict[str, Any]:
        with holder("take", busy) as pid:
            found = runs.run(EAGER, "engine.gpu_memory_utilization=0.9")
            return expect(found, (75,), f"process {pid} |not shown", "auto would take")

    def full() -> dict[str, Any]:
        with holder("take", gpus()[0].free_bytes - int(1.2 * GIB)) as pid:
            return expect(runs.run(EAGER), (75,), f"process {pid} |not shown")

    def large() -> dict[str, Any]:
        short = "engine.gpu_memory_utilization=0.15"
        found = runs.run_large(EAGER, short, "model.max_model_len=131072")
        fits = re.search(r"What would fit: .*?model\.max_model_len (\d+)", found["message"])
        told = expect(found, (2,), "What would fit")
        if not told["ok"] or fits is None:
            return told | {"ok": False}
        again = runs.run_large(EAGER, short, f"model.max_model_len={fits[1]}")
        return expect(again, (0,)) | {"refused": told, "took": fits[0]}

    def late(*settings: str, taken: float, codes: tuple[int, ...]) -> dict[str, Any]:
        with holder("watch", int(taken)) as pid:
            return expect(runs.run_large(*settings), codes, f"process {pid} |not shown")

    def half() -> dict[str, Any]:
        with holder("take", total // 2):
            found = runs.run(EAGER)
            is_said = any("other processes hold" in warning for warning in found["warnings"])
            return expect(found, (0,)) | {"is_said": is_said}

    found: dict[str, list[Case]] = {
        "held": [("held, the model cannot fit", held), ("held, a share is asked for", share)],
        "full": [("all but 1.2 GiB held, tiny model", full)],
        "large": [("too large for the empty device, then what fits", large)],
        "half": [("half held, auto", half)],
        # Weights are there: what comes next is a compiled profile run, or an eager one.
        "late": [
            ("taken while loading, compiled", lambda: late(taken=12 * GIB, codes=(75,))),
            ("taken while loading, eager", lambda: late(EAGER, taken=12 * GIB, codes=(75,))),
        ],
        # The KV cache is there, and little is missing: the steps may also succeed.
        "step": [
            ("taken before the first step", lambda: late(EAGER, taken=0.85 * total, codes=(0, 75)))
        ],
    }
    if len(gpus()) > 1:
        found["devices"] = cases_of_two_devices(runs, busy)
    return found


def cases_of_two_devices(runs: Runs, busy: int) -> list[Case]:
    """`busy`: bytes that leave too little of a device."""

    def other_device() -> dict[str, Any]:
        with holder("take", busy, index=1) as pid:
            found = runs.run_large(EAGER, "model.tensor_parallel_size=2")
            return expect(found, (75,), "GPU 1", f"process {pid} |not shown")

    def other_device_late() -> dict[str, Any]:
        with holder("watch", 8 * GIB, index=1) as pid:
            found = runs.run_large(EAGER, "model.tensor_parallel_size=2")
            return expect(found, (75,), f"process {pid} |not shown")

    return [
        ("held on the second device", other_device),
        ("taken on the second device while loading", other_device_late),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--parts", nargs="*")
    arguments = parser.parse_args()
    is_ok = True
    with tempfile.TemporaryDirectory() as folder:
        found = cases(Runs(Path(folder)))
        for part in arguments.parts or found:
            for name, case in found[part]:
                try:
                    record = case()
                except (AssertionError, subprocess.TimeoutExpired) as error:
                    record = {"ok": False, "message": str(error)[-600:]}
                is_ok &= record["ok"]
                line = json.dumps({"part": part, "case": name, **record})
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
                with arguments.log.open("a") as log:
                    log.write(line + "\n")
    sys.exit(not is_ok)


if __name__ == "__main__":
    main()
