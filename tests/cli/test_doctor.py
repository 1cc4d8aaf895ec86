"""`doctor` looks, and leaves the places it looks at as it found them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from batchinfer.cli import doctor
from batchinfer.cli.app import cli
from batchinfer.errors import TransientError
from batchinfer.quantization import Machine
from batchinfer.storage.local import LocalStore
from batchinfer.testing import FakePlan, fake_kind


@pytest.fixture(autouse=True)
def _no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "engine_kind", lambda _: fake_kind(FakePlan()))


def check(store: Path) -> Result:
    return CliRunner().invoke(cli, ["doctor", "--store", str(store)])


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_what_is_unknown_is_unknown_of_the_engine_that_was_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for engine, title in (("vllm", "vLLM"), ("batchinfer.testing", "the engine for tests")):
        doctor.show_quantizations(Machine(None, engine=engine))
        assert f"unknown without {title} and a device" in capsys.readouterr().out


@pytest.mark.parametrize("there", ["", "results", "results/_batchinfer/parts"])
def test_a_check_of_a_store_makes_no_folder_that_stays(there: str, tmp_path: Path) -> None:
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    before = everything(tmp_path)
    checked = check(tmp_path / "results" / "of" / "june")
    assert checked.exit_code == 0, checked.output
    assert "create work" in checked.output
    assert everything(tmp_path) == before


def test_what_somebody_else_wrote_in_the_meantime_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beside(self: LocalStore, key: str) -> bool:
        (tmp_path / "results" / "theirs").write_text("theirs")
        return True

    monkeypatch.setattr(LocalStore, "supports_create", beside)
    check(tmp_path / "results")
    assert everything(tmp_path) == ["results", "results/theirs"]


@pytest.mark.parametrize("method", ["read", "list", "supports_create"])
def test_a_check_that_fails_halfway_leaves_nothing(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Iterator[Any]:
        raise TransientError("the disk has gone")

    monkeypatch.setattr(LocalStore, method, fail)
    checked = check(tmp_path / "results")
    assert "the disk has gone" in checked.output
    assert everything(tmp_path) == []
