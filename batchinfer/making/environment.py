"""llm-compressor's Python environment: it pins other versions than the engine's.

Made when it is first needed, from the lock file beside this module, below the user's cache; an
environment is named after what it is made from, so that a new lock makes a new one. Must not know:
what runs in it.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from batchinfer.errors import ConfigError
from batchinfer.making.cached import user_cache
from batchinfer.making.publish import publish_folder, sweep
from batchinfer.quantization import RECIPES

_LOCK = Path(__file__).with_name("llm_compressor.lock")
_PYTHON = "bin/python"
_TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def llm_compressor_python(*, is_cpu: bool, on_step: Callable[[str], None]) -> Path:
    """The interpreter of an environment that has llm-compressor. Minutes, the first time.

    `on_step` is called with what is done. Raises ConfigError if the environment cannot be made.
    """
    target = environment_folder(is_cpu=is_cpu)
    torch = _torch(is_cpu)

    def fill(temporary: Path) -> None:
        sweep(target.parent)
        on_step("making the environment of llm-compressor (minutes, once)")
        _call([sys.executable, "-m", "venv", str(temporary)], "no environment can be made")
        python = f"{temporary}/{_PYTHON}"
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        if is_cpu:
            # By its full version and first: the index's own torch may be the CUDA build.
            try:
                _call([*pip, torch], "")
            except ConfigError:
                _call([*pip, "--index-url", _TORCH_CPU_INDEX, torch], "torch cannot be fetched")
        else:
            _call([*pip, torch], "torch cannot be fetched")
        # Without its dependencies: they are in the lock, and torch stays the build it is.
        others = temporary / "others.txt"
        lines = [line for line in _LOCK.read_text().splitlines() if not line.startswith("torch==")]
        others.write_text("\n".join(lines))
        _call([*pip, "--no-deps", "-r", str(others)], "its packages cannot be fetched")
        _call([python, "-I", "-c", "import llmcompressor"], "it cannot be imported")

    publish_folder(
        target,
        fill,
        on_wait=lambda: on_step("waiting for another process to make the environment"),
        advice="Set XDG_CACHE_HOME to a folder that can be written and has room for 2 GB",
    )
    return target / _PYTHON


def environment_folder(*, is_cpu: bool) -> Path:
    """Where the environment is, or would be."""
    made_from = "\0".join([_LOCK.read_text(), _torch(is_cpu), platform.python_version()])
    digest = hashlib.sha256(made_from.encode()).hexdigest()[:16]
    return user_cache() / "environments" / f"llm-compressor-{digest}"


def _without_it() -> str:
    *names, last = [name for name, recipe in RECIPES.items() if recipe.write is not None]
    return f"{', '.join(names)} and {last}"


def _torch(is_cpu: bool) -> str:
    """The requirement of torch; without the CPU build's suffix it is the index's own build."""
    pin = next(line for line in _LOCK.read_text().splitlines() if line.startswith("torch=="))
    return pin if is_cpu else pin.partition("+")[0]


def _call(command: Sequence[str], what_failed: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if "ERROR" in line]
        said = (lines or done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(
            f"llm-compressor's environment cannot be made, {what_failed}: {said[:300]}. Methods "
            f"{_without_it()} need none"
        )
