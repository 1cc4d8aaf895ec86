"""What every section of a job file shares: strictness, and errors that know their key.

Must not know: any setting.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

#: How a setting decides what is in an output: by its value, by what it resolves to with the model
#: on this machine, or by the content of what it names.
DecidesBy = Literal["value", "resolved", "content"]


class Section(BaseModel):
    """What all parts of a job share: immutable, no unknown keys, no silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TaskSection(Section):
    """The settings of one task, which do not apply to any other."""

    task: ClassVar[str]  # as in the job file's `task`
    samples_key: ClassVar[str | None] = None  # of how many results a row has; None: one

    def check_beside(self, *, max_model_len: int | None, on_too_long: str) -> None:
        """Raise for what contradicts `model.max_model_len` or `prompt.on_too_long`, in a job of
        this task.
        """


def decides_results(by: DecidesBy = "value") -> JsonDict:
    """Marks a field (`json_schema_extra`), or a section with all its keys: an output that was begun
    with another value is refused. Read by config/deciding.py.
    """
    return {"decides_results": by}


def reads_column(data_type: str, description: str) -> JsonDict:
    """Marks a field that names columns of the input (`json_schema_extra`): the type that such a
    column has, in Arrow's words, and what it holds. Read by config/columns.py.
    """
    return {"reads_column": [data_type, description]}


def key_error(key: str, sentence: str) -> PydanticCustomError:
    """The error a section's validator raises about its own `key`, so that its line is reported."""
    return PydanticCustomError("key_error", "{key}: {sentence}", {"key": key, "sentence": sentence})


def exactly_one(keys: Iterable[str]) -> JsonDict:
    """The same rule for the JSON Schema."""
    return {"oneOf": [{"required": [key]} for key in keys]}


def require_exactly_one(section: Section, keys: tuple[str, ...]) -> None:
    """Raise ValueError unless one of `keys` is given (is not None)."""
    given = [key for key in keys if getattr(section, key) is not None]
    if len(given) != 1:
        names = f"{', '.join(keys[:-1])} or {keys[-1]}"
        raise ValueError(f"needs exactly one of {names}, got {' and '.join(given) or 'none'}")
