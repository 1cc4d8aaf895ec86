"""A job that is being put together, a setting at a time.

Must not know: who says the settings. Invariant: what is said is checked as in a job file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from batchinfer.config import Job, LoadedJob, Override, load_job

#: Stand for what a job cannot do without until it is said.
_STAND_INS: Mapping[str, Mapping[str, Any]] = {
    "input": {"path": "-"},
    "model": {"path": "-"},
    "output": {"path": "-"},
}
_PROMPT: Mapping[str, Any] = {"column": "-"}  # of a prompt there is one of several keys


class JobDraft:
    """Settings by dotted key. What `sets` (--set) say overrides them; variables say nothing here,
    as they belong to this start and not to the job.
    """

    def __init__(self, sets: Sequence[str]) -> None:
        self._sets = sets
        self._of_sets = [text.partition("=")[0].strip() for text in sets]
        self._said: dict[str, tuple[Any, str]] = {}  # key -> value, origin

    def say(self, key: str, value: Any, origin: str) -> None:
        self._said[key] = (value, origin)

    def take_back(self, key: str) -> None:
        self._said.pop(key, None)

    def says(self, key: str) -> bool:
        """Whether a setting, or one of a section, is said; `key` may be of either."""
        return any(
            f"{known}.".startswith(f"{key}.") or key.startswith(f"{known}.")
            for known in (*self._said, *self._of_sets)
        )

    def value(self, key: str) -> Any:
        return self._said[key][0] if key in self._said else None

    def load(self, defaults: Mapping[str, Any] | None = None) -> LoadedJob:
        """The job as far as it is said, the rest stood in for. `defaults`: said where nobody does.

        Raises ConfigError.
        """
        values = [(key, value, "default") for key, value in (defaults or {}).items()]
        values += [(key, value, origin) for key, (value, origin) in self._said.items()]
        options = [Override.of_option(key, value, origin) for key, value, origin in values]
        stand_ins = dict(_STAND_INS) if self.says("prompt") else {**_STAND_INS, "prompt": _PROMPT}
        return load_job(None, self._sets, {}, options=options, otherwise=stand_ins)

    @property
    def job(self) -> Job:
        return self.load().job
