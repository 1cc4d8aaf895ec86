"""The command `quantize` and its options, as the recipes describe them.

Must not know: which methods there are, how anything is done. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from batchinfer.quantization import RECIPES, Option, Recipe


def _named(recipes: Mapping[str, Recipe], text: Callable[[Recipe], str]) -> str:
    """A clause for each thing that may be said of recipes, after those of which it is true."""
    clauses: dict[str, list[str]] = {}
    for method, recipe in recipes.items():
        clauses.setdefault(text(recipe), []).append(method)
    return "; ".join(f"{', '.join(methods)}: {what}" for what, methods in clauses.items())


def _way(recipe: Recipe) -> str:
    if recipe.options:
        return f"takes {', '.join(f'--{option.name}' for option in recipe.options)}"
    return "calibrated" if recipe.texts == "needed" else "rounded to nearest"


def recipe_options(
    recipes: Mapping[str, Recipe],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Every option that some recipe takes, once."""
    found: dict[str, dict[str, Option]] = {}
    for method, recipe in recipes.items():
        for option in recipe.options:
            found.setdefault(option.name, {})[method] = option

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        for name, of_methods in reversed(found.items()):
            kind = _type(list(of_methods.values()))
            command = click.option(f"--{name}", type=kind, help=_help(of_methods))(command)
        return command

    return decorated


def _type(options: list[Option]) -> click.IntRange | click.Choice[str]:
    """One that takes the values of each; `own_options` holds a recipe's own against them."""
    numbers = [option.values for option in options if isinstance(option.values, range)]
    if len(numbers) == len(options):
        return click.IntRange(min(r.start for r in numbers), max(r.stop - 1 for r in numbers))
    return click.Choice(list(dict.fromkeys(str(v) for option in options for v in option.values)))


def _help(of_methods: Mapping[str, Option]) -> str:
    meaning = next(iter(of_methods.values())).meaning
    clauses = [
        f"--method {method}"
        + (", which needs it: no default" if option.is_needed else f" (default: {option.default})")
        for method, option in of_methods.items()
    ]
    return f"{meaning[0].upper()}{meaning[1:]}. Only with {', '.join(clauses)}."


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path())
@click.option(
    "--method",
    type=click.Choice(list(RECIPES)),
    required=True,
    help=f"{_named(RECIPES, _way)}.",
)
@recipe_options(RECIPES)
@click.option("--calibration", metavar="PARQUET", help="File, folder or glob of calibration texts.")
@click.option("--column", metavar="NAME", help="Column of --calibration that holds the texts.")
@click.option(
    "--rows",
    "max_rows",
    type=click.IntRange(min=1),
    help="Number of rows to calibrate with: the first that are not blank.  [default: 512]",
)
def quantize(
    model: str,
    out: str,
    method: str,
    calibration: str | None,
    column: str | None,
    max_rows: int | None,
    **options: Any,
) -> None:
    """Write a quantized checkpoint of MODEL, a folder or hub name, into the new folder OUT.

    Jobs with model.path: OUT run in that quantization; plain vLLM can load it too. With --method
    gguf OUT is one file, for jobs with engine.name: llama_cpp.
    """
    from batchinfer.cli.calibration import Calibration
    from batchinfer.cli.quantize import quantize_model

    recipe = RECIPES[method]
    if recipe.texts == "none" and (calibration, column) != (None, None):
        raise click.UsageError(f"--method {method} learns from no texts and takes no --calibration")
    if recipe.texts == "needed" and None in (calibration, column):
        raise click.UsageError(f"--method {method} needs --calibration PARQUET and --column NAME")
    if (calibration is None) != (column is None):
        raise click.UsageError("--calibration PARQUET and --column NAME go together")
    if calibration is None and max_rows is not None:
        raise click.UsageError("--rows goes with --calibration PARQUET")
    texts = None
    if calibration is not None and column is not None:
        texts = Calibration(calibration, column, max_rows or 512)
    quantize_model(model, out, recipe, own_options(recipe, options), texts)


def own_options(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, str]:
    """Those that were given. Raises UsageError for one that the recipe does not take."""
    own = {option.name: option for option in recipe.options}
    found = {name: str(value) for name, value in given.items() if value is not None}
    for name, value in found.items():
        if name not in own:
            raise click.UsageError(f"--method {recipe.method} takes no --{name}")
        allowed = [str(value) for value in own[name].values]
        if value not in allowed:
            raise click.UsageError(
                f"--method {recipe.method} takes --{name} {', '.join(allowed)}, not {value}"
            )
    return found
