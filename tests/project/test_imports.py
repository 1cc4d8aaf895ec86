"""Imports point one way, and heavy libraries stay in the rooms that own them."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePath

import pytest

PACKAGE = Path(__file__).parents[2] / "batchinfer"

#: docs/architecture.md: a room may import itself and what stands before it.
ROOMS = (
    "limits",
    "errors",
    "imports",
    "signals",
    "native",
    "quantization",
    "config",
    "storage",
    "source",
    "model",
    "making",
    "llama_cpp",
    "prompt",
    "plan",
    "engine",
    "tasks",
    "sink",
    "ledger",
    "telemetry",
    "verdict",
    "runner",
    "forecast",
    "api",
    "evaluation",
    "serving",
    "openai_batch",
    "cli",
    "testing",
)

#: Library -> the only files that may import it.
OWNERS = {
    "vllm": ("engine/vllm/*.py", "engine/vllm/*/*.py", "quantization/methods/*/vllm.py"),
    "torch": (
        "engine/vllm/*.py",
        "engine/vllm/*/*.py",
        "making/*.py",
        "making/*/*.py",
        "quantization/methods/*/*.py",
    ),
    "safetensors": ("making/*.py", "making/*/*.py"),
    "compressed_tensors": ("quantization/methods/compressed_tensors/write.py",),
    "llmcompressor": ("making/in_llm_compressor.py",),
    "datasets": ("making/in_llm_compressor.py",),
    "s3fs": ("storage/*.py",),
    "fsspec": ("storage/*.py",),
    "botocore": ("storage/*.py",),
    "click": ("cli/*.py",),
    "xllamacpp": ("llama_cpp/*.py",),
    "gguf": ("making/gguf/*.py",),
    "matplotlib": ("evaluation/comparison/plot.py",),
    "ray": ("runner/replicas/on_ray.py",),
}

#: Modules of a method that every command reads, so that even owners' libraries stay out of them.
LIGHT = ("__init__.py", "record.py", "recipes.py", "files.py")

#: Each engine's own folder, which no file outside it imports: it is found by its name.
ENGINE_ROOMS = [f"batchinfer.engine.{f.parent.name}" for f in PACKAGE.glob("engine/*/kind.py")]

HEAVY = {"vllm", "torch", "transformers", "polars", "s3fs", "xllamacpp"}


def imported_modules(path: PurePath, source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import anywhere in `source`, `from a import b` as a.b."""
    package = ("batchinfer", *path.parts[:-1])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            parts = [*base, *([node.module] if node.module else [])]
            yield from ((node.lineno, ".".join([*parts, alias.name])) for alias in node.names)


def module_of(path: Path) -> str:
    """The dotted name of a file of the package."""
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


def needed_modules(path: PurePath, source: str) -> Iterator[str]:
    """The files of the package that `source`, standing at `path` below it, imports anywhere."""
    for _, module in imported_modules(path, source):
        name = module if is_module(module) else module.rpartition(".")[0]
        if is_module(name) and name != PACKAGE.name:  # whose face has the version
            yield name


def is_module(name: str) -> bool:
    if name.partition(".")[0] != PACKAGE.name:
        return False
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def violations(path: PurePath, source: str) -> list[str]:
    """What `source`, standing at `path` below the package, imports and must not."""
    room = path.parts[0].removesuffix(".py")
    found = []
    for line, module in imported_modules(path, source):
        top, _, rest = module.partition(".")
        if top in OWNERS:
            patterns = OWNERS[top]
            is_light = path.name in LIGHT and path.match("quantization/methods/*/*")
            if is_light or not any(path.match(pattern) for pattern in patterns):
                owners = " and ".join(patterns) or "no file"
                found.append(f"{path}:{line} imports {top}, which belongs to {owners}")
        for engine in ENGINE_ROOMS:
            is_inside = ".".join(("batchinfer", *path.parts)).startswith(f"{engine}.")
            if f"{module}.".startswith(f"{engine}.") and not is_inside:
                found.append(f"{path}:{line} imports {module}, which is found by name")
        if top == "batchinfer" and room in ROOMS:
            target = rest.partition(".")[0]
            if target in ROOMS and ROOMS.index(target) > ROOMS.index(room):
                found.append(f"{path}:{line} imports {module}, but {room} stands before {target}")
    return found


def test_every_import_is_allowed() -> None:
    """Every import points to an earlier room and to a library of that room."""
    found = [
        violation
        for file in sorted(PACKAGE.rglob("*.py"))
        for violation in violations(file.relative_to(PACKAGE), file.read_text())
    ]
    assert not found, "\n".join(found)


def test_no_files_need_each_other() -> None:
    """Not even by imports inside functions, or for types alone: one of them can be read first."""
    needs = {
        module_of(file): set(needed_modules(file.relative_to(PACKAGE), file.read_text()))
        for file in PACKAGE.rglob("*.py")
    }
    graphlib.TopologicalSorter(needs).prepare()


def test_every_file_is_in_a_known_room() -> None:
    names = {
        path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix in ("", ".py")
    }
    assert names - {"__pycache__", "__init__", "__main__", "kernels_src"} <= set(ROOMS)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("config/job.py", "from batchinfer.runner import run"),
        ("plan/order.py", "def f():\n    import batchinfer.engine.base"),
        ("telemetry/logs.py", "from batchinfer import cli"),
        ("storage/local.py", "from ..sink.schema import SCHEMA"),
        ("runner/loop.py", "import vllm"),
        ("runner/loop.py", "from batchinfer.engine.vllm.options import check_options"),
        ("engine/hardware.py", "from batchinfer.engine import vllm"),
        ("cli/doctor.py", "def f():\n    import batchinfer.engine.vllm.setup"),
        ("engine/base.py", "from torch import nn"),
        ("model/weights.py", "import torch"),
        ("quantization/methods/gptq/record.py", "import vllm"),
        ("quantization/methods/gptq/files.py", "import torch"),
        ("quantization/methods/qtip/recipes.py", "import torch"),
        ("ledger/lease.py", "import s3fs.core"),
        ("runner/loop.py", "if True:\n    import click"),
        ("cli/plot.py", "import matplotlib.pyplot"),
        ("runner/replicas/relay.py", "import ray"),
    ],
)
def test_an_arrow_backwards_is_found(path: str, source: str) -> None:
    assert len(violations(PurePath(path), source)) == 1


def test_help_loads_no_heavy_library() -> None:
    program = "import json, sys, batchinfer.cli; print(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    modules = json.loads(done.stdout)
    assert not HEAVY & {module.partition(".")[0] for module in modules}
    assert "batchinfer.quantization" not in modules  # every method: half of the time
