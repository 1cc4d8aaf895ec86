"""A recipe says itself which module makes it and which options it takes; `quantize` knows none."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner

from batchinfer.cli import quantize as command
from batchinfer.cli.quantization import own_options, recipe_options
from batchinfer.errors import ConfigError
from batchinfer.making.order import LayerCounts, MakingOrder, Reporter
from batchinfer.quantization import RECIPES, Option, Recipe
from tests.support.jobs import MODEL

CODEBOOKS = Recipe(
    "codebooks",
    "sums of codebook entries",
    "SUMS",
    "none",
    make="made_up_maker",
    options=(
        Option("bits", "of a weight", range(2, 13), is_needed=True),
        Option("fit", "how books are found", ("beam", "greedy")),
    ),
)


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> list[MakingOrder]:
    """What the recipe's module was asked to make."""
    found: list[MakingOrder] = []

    def make(order: MakingOrder, reporter: Reporter) -> LayerCounts:
        found.append(order)
        (order.target / "config.json").write_text("{}")
        (order.target / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        return LayerCounts(1, 1)

    module = ModuleType("made_up_maker")
    module.__dict__["make"] = make
    monkeypatch.setitem(sys.modules, "made_up_maker", module)
    monkeypatch.setattr(command, "_stop_by_error", lambda what_is_left: None)
    return found


def test_the_module_that_a_recipe_names_makes_its_checkpoint(
    orders: list[MakingOrder], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command.quantize_model(str(MODEL), str(out), CODEBOOKS, {"bits": "12"}, None)
    assert [order.options for order in orders] == [{"bits": "12", "fit": "beam"}]
    assert (out / "config.json").exists()


def test_an_option_without_a_usual_value_is_needed(
    orders: list[MakingOrder], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--method codebooks needs --bits: of a weight"):
        command.quantize_model(str(MODEL), str(tmp_path / "out"), CODEBOOKS, {}, None)
    assert not orders and not list(tmp_path.iterdir())


def test_help_has_the_options_of_all_recipes() -> None:
    @click.command()
    @recipe_options({"codebooks": CODEBOOKS, "qtip": RECIPES["qtip"]})
    def asked(**options: object) -> None: ...

    said = " ".join(CliRunner().invoke(asked, ["--help"], terminal_width=200).output.split())
    assert "[1<=x<=12]" in said and said.count("--bits") == 1
    assert "with --method codebooks, which needs it: no default, --method qtip, which" in said
    assert "Only with --method codebooks (default: beam)" in said


def test_a_recipe_takes_its_own_values_alone() -> None:
    """Click allows those of every recipe."""
    assert own_options(RECIPES["qtip"], {"bits": 8, "code": None}) == {"bits": "8"}
    for recipe, bits in ((CODEBOOKS, 1), (RECIPES["qtip"], 12)):
        with pytest.raises(click.UsageError, match=f"takes --bits .*, not {bits}"):
            own_options(recipe, {"bits": bits})
    with pytest.raises(click.UsageError, match="--method int8 takes no --bits"):
        own_options(RECIPES["int8"], {"bits": 4})
