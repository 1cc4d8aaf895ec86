"""What a caller adds to the job for one start. Must not know: how it is asked for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What the command line adds to the job for one start."""

    limit: int | None = None
    slice: tuple[int, int] | None = None  # --slice i/n, i from 1
    restart: bool = False
    retry_failed: bool = False

    @property
    def lease_name(self) -> str:
        return "all" if self.slice is None else f"{self.slice[0]}-of-{self.slice[1]}"
