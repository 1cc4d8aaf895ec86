"""What templates get in place of a value that is missing or cannot be read.

It fails when it is used. A missing value may be asked about: it is false, equal to none, takes a
default, and so do its parts; only who prints it or computes with it gets the row's error. Must not
know: Arrow, where rows come from. Invariant: no stand-in ever becomes text.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from jinja2 import StrictUndefined, Undefined

from batchinfer.errors import RowError


class Unreadable(StrictUndefined):
    """A value of a type that cannot be in a prompt. No default hides it."""

    __slots__ = ()

    def __init__(self, error: RowError) -> None:
        # jinja2 calls the last to make what it raises, and gives it the first.
        super().__init__(error.message, exc=lambda text: RowError(error.kind, text))  # type: ignore[arg-type]

    __repr__ = __abs__ = __round__ = __index__ = StrictUndefined.__str__


class Missing(Unreadable):
    """A null, or a number that is none."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python asks what it could do with it
            raise AttributeError(name)
        return self

    def __getitem__(self, key: object) -> Missing:  # type: ignore[override]
        return self

    def __bool__(self) -> bool:  # type: ignore[override]
        return False

    def __eq__(self, other: object) -> bool:  # type: ignore[override]
        return is_none(other)

    def __ne__(self, other: object) -> bool:  # type: ignore[override]
        return not is_none(other)

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(None)


def stand_in(error: RowError) -> Unreadable:
    return Missing(error) if error.kind == "missing_value" else Unreadable(error)


def is_none(value: object) -> bool:
    """The test `is none`."""
    return value is None or isinstance(value, Missing)


def is_defined(value: object) -> bool:
    """The test `is defined`: what cannot be read is there, a null is not."""
    is_unreadable = isinstance(value, Unreadable) and not isinstance(value, Missing)
    return is_unreadable or not isinstance(value, Undefined)


def default(value: Any, default_value: Any = "", boolean: bool = False) -> Any:
    """The filter `default`: also for null."""
    if value is None or not is_defined(value) or (boolean and not value):
        return default_value
    return str(value) if isinstance(value, Unreadable) else value  # which raises its error


def json_value(value: Any) -> Any:
    """What json writes for a value that it does not know."""
    if isinstance(value, Missing):
        return None
    if isinstance(value, Unreadable):
        return str(value)
    if isinstance(value, Decimal):
        whole, number = int(value), float(value)
        if whole == value:
            return whole
        if Decimal(repr(number)) == value:
            return number
        raise TypeError(f"{value} has more digits than a JSON number: write it as a text")
    raise TypeError(f"a {type(value).__name__} is not JSON")
