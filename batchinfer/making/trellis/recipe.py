"""Trellis-coded checkpoints as `batchinfer quantize` orders them.

Must not know: how weights are coded.
"""

from __future__ import annotations

from pathlib import Path

from batchinfer.making.cached import content_key, user_cache
from batchinfer.making.order import LayerCounts, MakingOrder, Reporter
from batchinfer.making.trellis.make import Coding, Places, code_model
from batchinfer.native import cpu_flags


def make(order: MakingOrder, reporter: Reporter) -> LayerCounts:
    """Code the model in `bits` a weight and one of the codes. Raises what `code_model` does."""
    num_bits, code = int(order.options["bits"]), order.options["code"]
    reporter.say(f"coding with {num_bits} bits a weight ({code})")
    source = Path(order.model.path)
    texts = list(order.texts)
    # As it was first written: blocks that an older version finished are reused.
    how = f"Trellis(num_bits={num_bits}, code={code!r})"
    made_by = f"({order.recipe.identity!r}, {how}, {texts!r})"
    places = Places(
        finished=order.finished,
        key=content_key(source, made_by, user_cache() / "models"),
        libraries=user_cache() / "libraries",
    )
    coding = Coding(num_bits, code, texts, order.model.max_model_len)
    return code_model(source, order.target, coding, places, cpu_flags(), reporter)
