"""A quantized checkpoint whose weights are chosen by what the model does on rows of text.

llm-compressor does it, in a process of its own. Must not know: how; where folders are.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from batchinfer.errors import ConfigError
from batchinfer.model import ModelFacts
from batchinfer.quantization import Recipe

#: What it says of where it is: "(2/7): Calibrating:  43%|".
_BAR = re.compile(rb"\((\d+)/(\d+)\): \w+:\s+(\d+)%")
_MAX_TOKENS = 2048  # of a row: activations of all rows are held in memory
_PROGRAM = Path(__file__).with_name("in_llm_compressor.py")


def calibrate(
    python: Path,
    model: ModelFacts,
    target: Path,
    recipe: Recipe,
    texts: Sequence[str],
    on_progress: Callable[[float], None],
) -> None:
    """Write the checkpoint into `target`, an empty folder. `on_progress` takes 0 to 1.

    Raises ConfigError if llm-compressor fails.
    """
    from batchinfer.making.stored_weights import copy_settings

    settings = {
        "model": model.path,
        "target": str(target),
        "modifiers": recipe.modifiers,
        "preset": recipe.preset,
        "texts": list(texts),
        "max_tokens": min(_MAX_TOKENS, model.max_model_len),
    }
    with tempfile.TemporaryDirectory(prefix="batchinfer-") as folder:
        file = Path(folder) / "settings.json"
        file.write_text(json.dumps(settings))
        environ = os.environ | {"HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(
            [python, "-I", _PROGRAM, file],
            cwd=folder,  # it writes logs and recipes where it runs
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            said = _follow(process.stdout, on_progress)
            code = process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
    if code:
        lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "no message"
        what = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise ConfigError(f"llm-compressor {what} on {model.path}: {last[:300]}")
    config = (target / "config.json").read_bytes()
    copy_settings(Path(model.path), target)  # its own copies are rewritten by another library
    (target / "config.json").write_bytes(config)


def _follow(stream: IO[bytes] | None, on_progress: Callable[[float], None]) -> bytes:
    """Read to the end; returns the last of what was said."""
    assert stream is not None
    tail = b""
    while chunk := os.read(stream.fileno(), 1 << 16):
        tail = (tail + chunk)[-(1 << 16) :]
        if found := _BAR.findall(tail):
            step, num_steps, percent = map(int, found[-1])
            on_progress((step - 1 + percent / 100) / num_steps)
    return tail
