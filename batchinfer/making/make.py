"""Makes the checkpoint that is ordered, in its recipe's way.

Must not know: methods, where folders are.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from batchinfer.making.order import MakingOrder, Reporter


def make(order: MakingOrder, reporter: Reporter) -> None:
    """Write the checkpoint into the order's folder. What is imported for it may be heavy.

    Raises ConfigError, InputError, TransientError.
    """
    recipe = order.recipe
    if recipe.make is not None:
        made = importlib.import_module(recipe.make).make(order, reporter)
        reporter.say(f"quantized {made.num_quantized} of {made.num_linear} linear layers")
    elif recipe.modifiers:
        _calibrate(order, reporter)
    else:
        _round(order, reporter)


def _round(order: MakingOrder, reporter: Reporter) -> None:
    from batchinfer.making.rounding_writer import round_to_nearest

    recipe = order.recipe
    reporter.say(f"quantizing to {recipe.method} ({recipe.preset})")
    made = round_to_nearest(
        Path(order.model.path),
        order.target,
        recipe,
        lambda done, total: reporter.move(done / total),
    )
    reporter.say(f"quantized {made.num_quantized} of {made.num_linear} linear layers")


def _calibrate(order: MakingOrder, reporter: Reporter) -> None:
    from batchinfer.making.calibrated import calibrate
    from batchinfer.making.environment import llm_compressor_python

    python = llm_compressor_python(is_cpu=order.device != "cuda", on_step=reporter.say)
    reporter.say(f"calibrating {order.recipe.method} with {len(order.texts):,} rows")
    calibrate(python, order.model, order.target, order.recipe, list(order.texts), reporter.move)
