"""Whether a column's type has what a template reads of it, so that no row has to find out.

Must not know: templates' trees, rows. What a variable of the template itself stands for is not
followed: only steps that are written out behind a column are.
"""

from __future__ import annotations

import difflib

import pyarrow as pa

from batchinfer.prompt.numbers import ExactNumber
from batchinfer.prompt.references import Reference, Step
from batchinfer.prompt.values import first_unreadable, is_list, stored_type, why_unreadable

_UNKNOWN = pa.null()


def reference_problem(place: Reference, data_type: pa.DataType) -> str | None:
    """Why this place fails in every row, None if it need not. `data_type`: of its column."""
    read = f"column {place.column!r}"
    kind = stored_type(data_type)
    for number, step in enumerate(place.steps, start=1):
        is_last = number == len(place.steps)
        if kind == _UNKNOWN:
            return None
        part = _part(kind, step)
        if step.is_attribute and hasattr(_python_type(kind), str(step.key)):
            if part is None or (is_last and place.is_called):
                return None
            as_item = Step(step.key, is_attribute=False)
            return f"{read} has a field {step.key!r}, but {step} is a method: write {as_item}"
        if part is None:
            is_allowed = is_last and place.is_guarded
            return None if is_allowed else f"{read} has no {step}: {_instead(kind, step)}"
        read += str(step)
        kind = stored_type(part)
    if reason := why_unreadable(kind):
        return f"{read} {reason}"
    if place.is_printed and (unreadable := first_unreadable(kind)):
        where, reason = unreadable
        return f"{read} is printed with its part {where}, which {reason}"
    return None


def _part(data_type: pa.DataType, step: Step) -> pa.DataType | None:
    """The type behind the step, None if there is nothing."""
    types = pa.types
    if types.is_struct(data_type):
        index = data_type.get_field_index(step.key) if isinstance(step.key, str) else -1
        return data_type.field(index).type if index >= 0 else None
    if isinstance(step.key, str):
        return None
    if is_list(data_type):
        return data_type.value_type
    return _UNKNOWN if _python_type(data_type) in (str, list) else None


def _python_type(data_type: pa.DataType) -> type:
    """The Python type of its values in a template."""
    types = pa.types
    kinds = (
        (types.is_struct, dict),
        (types.is_boolean, bool),
        (types.is_integer, int),
        (types.is_floating, float),
        (types.is_decimal, ExactNumber),
        (types.is_nested, list),
    )
    return next((python_type for is_kind, python_type in kinds if is_kind(data_type)), str)


def _instead(data_type: pa.DataType, step: Step) -> str:
    if not pa.types.is_struct(data_type):
        return f"it is {data_type}"
    names = [field.name for field in data_type]
    close = difflib.get_close_matches(str(step.key), names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"its fields are {', '.join(names)}"
