"""What is said where llama.cpp is not there, is another version, or cannot run on the CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

from batchinfer.llama_cpp import installation
from batchinfer.llama_cpp.installation import CPU_FLAGS, VERSIONS, installation_fault
from tests.support.jobs import ROOT


@pytest.mark.parametrize(
    ("version", "flags", "words"),
    [
        (None, CPU_FLAGS, "llama.cpp is not installed (package xllamacpp): pip install"),
        ("1999.1.1", CPU_FLAGS, "xllamacpp 1999.1.1 is installed, and this version"),
        (VERSIONS[0], ("avx2",), "needs a CPU with avx2, fma, f16c, bmi2, and this one lacks fma"),
    ],
)
def test_a_fault_is_one_sentence(
    version: str | None,
    flags: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(installation, "installed_version", lambda: version)
    monkeypatch.setattr(installation, "cpu_flags", lambda: frozenset(flags))
    fault = installation_fault()
    assert fault is not None and words in fault and "\n" not in fault


def test_the_extra_and_the_lock_name_a_version_that_is_known() -> None:
    assert f'"xllamacpp=={VERSIONS[-1]}"' in (ROOT / "pyproject.toml").read_text()
    assert f"\nxllamacpp=={VERSIONS[-1]}\n" in (ROOT / "requirements" / "cpu.lock").read_text()
    assert installation_fault() is None


def test_the_library_is_loaded_without_anything_heavy() -> None:
    code = (
        "import sys; from batchinfer.llama_cpp.library import library; library(); "
        "print(sorted({'numpy', 'torch', 'transformers', 'tokenizers', 'pyarrow'} & "
        "{*sys.modules}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
