"""What a caller adds to the job for one start. Must not know: how it is asked for."""

from __future__ import annotations

from dataclasses import dataclass

_NOT_JOINED = {
    "slice": "a share of the input files, and joined runs share all of them",
    "restart": "the whole output",
    "retry_failed": "finished files, and joined runs only make new ones",
}


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What the command line adds to the job for one start."""

    limit: int | None = None
    slice: tuple[int, int] | None = None  # --slice i/n, i from 1
    restart: bool = False
    retry_failed: bool = False
    join: bool = False

    @property
    def clash_with_join(self) -> tuple[str, str] | None:
        """An option that joined runs do not have, and what it concerns; None: there is none."""
        for name, concerns in _NOT_JOINED.items():
            if self.join and getattr(self, name):
                return name, concerns
        return None

    @property
    def is_whole(self) -> bool:
        """Whether nobody else works on the output meanwhile."""
        return self.slice is None and not self.join

    @property
    def lease_name(self) -> str:
        if self.join:
            return "join"
        return "all" if self.slice is None else f"{self.slice[0]}-of-{self.slice[1]}"
