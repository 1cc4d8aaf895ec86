"""Where products in a filter do not fit into 128 bits, which polars does not say.

Must not know: SQL but for the words that multiply, how integers become as wide as that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl

_POWERS = frozenset({"pow", "power"})
#: Of signed integers with 128 bits, without the sign.
_MAX_BITS = 127


class Products:
    """Of one filter: its expression, and the same whose integers are doubles."""

    def __init__(self, expression: pl.Expr, in_doubles: pl.Expr, words: str) -> None:
        """`words`: the SQL's tokens between spaces."""
        self._expression = expression
        self._in_doubles = in_doubles
        tokens = words.lower().split()
        self._has_powers = not _POWERS.isdisjoint(tokens)
        self._has_products = self._has_powers or "*" in tokens

    def wrong_row(self, frame: pl.DataFrame, passes: pl.Series) -> dict[str, int] | None:
        """The integers of the first row that `passes` is wrong about: a product wrapped around.

        All leaves of the expression together bound the bits of any product of them. What may be
        beyond is computed with doubles, too, whose range suffices; where only their rounding
        differs, the row is taken for wrong as well.
        """
        import polars as pl

        if not self._has_products:
            return None
        if not self._has_powers and _num_bits(self._expression, frame) <= _MAX_BITS:
            return None
        whole = [name for name, dtype in frame.schema.items() if dtype.is_integer()]
        in_doubles = frame.cast(dict.fromkeys(whole, pl.Float64))
        expected = in_doubles.select(self._in_doubles.alias("passes")).to_series()
        wrong = passes.ne_missing(expected).arg_true()
        return frame.select(whole).row(int(wrong[0]), named=True) if len(wrong) else None


def _num_bits(expression: pl.Expr, frame: pl.DataFrame) -> int:
    """At least the bits of any integer that `+`, `-` and `*` make of the leaves of `expression`."""
    import polars as pl

    bits = 0
    pending = [expression]
    while pending:
        operation = pending.pop()
        inputs = operation.meta.pop()
        pending.extend(inputs)
        if inputs:
            continue
        if operation.meta.is_literal():
            values: list[Any] = pl.select(operation.explode()).to_series().to_list()
        elif frame.schema[operation.meta.output_name()].is_integer():
            column = frame[operation.meta.output_name()]
            values = [column.min(), column.max()]
        else:
            values = [2**64]  # a function's or a cast's result
        integers = [value.bit_length() for value in values if isinstance(value, int)]
        bits += max([1, *integers])
    return bits
