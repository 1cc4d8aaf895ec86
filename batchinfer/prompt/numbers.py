"""Numbers in templates: decimals are exact, and integers end.

Decimals are exact also beside floats, and printed as digits wherever they are. Python's Decimal
refuses arithmetic with a float, finds 0.1 unequal to it, rounds sums to 28 digits, and prints as
`0E-7` or, in a list, as `Decimal('1.50')`. Must not know: Arrow, templates.
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
#: Of an integer. An operation on longer ones is a single call into Python, of minutes, that no
#: signal ends. 4,300 digits, a seventieth, can be printed; the rest is for what is reduced.
MAX_BITS = 2**20
_MAX_INT_DIGITS = MAX_BITS * 3 // 10
_TOO_LONG = f"more than {MAX_BITS:,} bits (about {_MAX_INT_DIGITS:,} digits)"
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


def check_operation(operator: str, left: int, right: int) -> None:
    """Raises OverflowError if an operand or the result is too long, before it is computed."""
    num_bits = max(left.bit_length(), right.bit_length())
    if operator == "*":
        num_bits = left.bit_length() + right.bit_length()
    elif operator == "**" and right > 0 and abs(left) > 1:
        # |left| >= 2**k, with k one less than its bits: the power has more than k * right.
        num_bits = max(num_bits, (left.bit_length() - 1) * right)
    if num_bits > MAX_BITS:
        raise OverflowError(f"{operator!r} of integers: {_TOO_LONG}")


def check_integer(value: Any) -> None:
    """Raises OverflowError for an integer that is too long, and for a decimal of that many digits:
    making an integer of 1E+999999 is one long call, too.
    """
    is_long = isinstance(value, int) and value.bit_length() > MAX_BITS
    if is_long or (
        isinstance(value, Decimal) and value.is_finite() and value.adjusted() > _MAX_INT_DIGITS
    ):
        raise OverflowError(_TOO_LONG)


def check_places(places: Any) -> None:
    """Raises OverflowError for places to round to of which Python makes too long a power of ten."""
    if isinstance(places, int) and abs(places) > _MAX_INT_DIGITS:
        raise OverflowError(f"round to more than {_MAX_INT_DIGITS:,} places")


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
