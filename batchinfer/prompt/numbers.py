"""Decimals in templates: exact, also beside floats, and printed as digits wherever they stand.

Python's Decimal refuses arithmetic with a float, finds 0.1 unequal to it, rounds sums to 28 digits,
and prints as `0E-7` or, in a list, as `Decimal('1.50')`. Must not know: Arrow, templates.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any

# The product of two of Arrow's widest decimals; what is divided has no end, and is rounded as by
# Python.
_EXACT_DIGITS = 160
_ROUNDED_DIGITS = 28
_ROUNDED = ("truediv", "pow")
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_UNARY = ("neg", "pos", "abs")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


class ExactNumber(Decimal):
    """A float that meets one counts as the decimal that it is written as."""

    __slots__ = ()
    __hash__ = Decimal.__hash__

    def __str__(self) -> str:
        return format(self, "f")

    __repr__ = __str__

    def __round__(self, ndigits: int | None = None) -> Any:
        return _exact(Decimal(self).__round__(0 if ndigits is None else ndigits))


def readable_reason(error: Exception) -> str:
    """What an exception says, but of digits what a person can use: Python advises programmers."""
    text = str(error)
    if "set_int_max_str_digits" in text:
        return f"a number has too many digits (more than {sys.get_int_max_str_digits()})"
    return text


def _exact(result: Any) -> Any:
    return ExactNumber(result) if isinstance(result, Decimal) else result


def _operation(name: str, num_digits: int) -> Callable[..., Any]:
    of_decimal = getattr(Decimal, name)

    def operation(self: ExactNumber, *others: Any) -> Any:
        operands = (Decimal(repr(o)) if isinstance(o, float) else o for o in others)
        with localcontext() as context:
            context.prec = num_digits
            return _exact(of_decimal(self, *operands))

    return operation


for _name in (*_BINARY, *(f"r{name}" for name in _BINARY), *_UNARY, *_COMPARISONS):
    _digits = _ROUNDED_DIGITS if _name.removeprefix("r") in _ROUNDED else _EXACT_DIGITS
    setattr(ExactNumber, f"__{_name}__", _operation(f"__{_name}__", _digits))
