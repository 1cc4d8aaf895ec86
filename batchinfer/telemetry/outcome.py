"""How a start ended: what the JSON line on stdout says.

Must not know: who ends, or why. Nothing heavy is imported here: a start that failed before it began
prints the line too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchinfer.ledger import Totals


#: What the line counts of a start that failed before it knew its task: as for generation.
UNKNOWN_TASK = ("completion_tokens", "rows_cut", "rows_unparsed")


@dataclass(slots=True)
class Outcome:
    """How a start ended. `rows` are results: input rows times samples."""

    status: str  # complete | partial | stopped | skipped | failed
    exit_code: int
    output: str
    message: str = ""
    run: int | None = None
    totals: Totals | None = None  # of the whole output, when it is complete
    rows_durable: int = 0  # of this run
    rows_failed: int = 0  # of this run, or of the output when it is complete
    counts: Mapping[str, int | None] = field(default_factory=dict)  # of this run, by the task
    rows_computed: int = 0
    prompt_tokens: int = 0
    result_tokens: int = 0  # generated, or scored
    count_names: Sequence[str] = UNKNOWN_TASK  # of what the task counts, its result tokens first
    generation_s: float = 0.0
    stalled_s: float = 0.0
    steps: int = 0
    mean_num_running: float = 0.0
    share_of_steps_underfilled: float = 0.0
    verdict: Mapping[str, Any] | None = None  # of `Verdict`; None: no step was run
    tuning: Mapping[str, Any] | None = None  # of `engine.tune`; None: it is off
    spent: Mapping[str, Any] | None = None  # money and energy; None: neither is known
    startup_s: float | None = None  # from the command to the end of the first engine step
    warnings: list[str] = field(default_factory=list)  # one line each, the first ones

    def count(self, name: str) -> int | None:
        """The count in the whole output if it is complete, else in this run. None: not counted."""
        return (self.totals.counts if self.totals else self.counts).get(name, 0)

    def as_dict(self) -> dict[str, Any]:
        """The JSON line on stdout."""
        token_name, *others = self.count_names
        speed = self.result_tokens / self.generation_s if self.generation_s else 0.0
        return {
            "status": self.status,
            "exit_code": self.exit_code,
            "run": self.run,
            "rows": self.totals.rows if self.totals else self.rows_durable,
            "rows_failed": self.totals.rows_failed if self.totals else self.rows_failed,
            **{name: self.count(name) for name in others},
            "rows_computed": self.rows_computed,
            "prompt_tokens": self.prompt_tokens,
            token_name: self.result_tokens,
            "generation_s": round(self.generation_s, 3),
            f"{token_name}_per_s": round(speed, 1),
            "steps": self.steps,
            "mean_num_running": round(self.mean_num_running, 1),
            "share_of_steps_underfilled": round(self.share_of_steps_underfilled, 4),
            "stalled_s": round(self.stalled_s, 3),
            "startup_s": None if self.startup_s is None else round(self.startup_s, 3),
            "verdict": self.verdict,
            "tuning": self.tuning,
            "spent": self.spent,
            "output": self.output,
            "warnings": self.warnings,
            "message": self.message,
        }


@dataclass(slots=True)
class ServerOutcome:
    """How a server ended."""

    status: str  # stopped | failed
    exit_code: int
    message: str
    url: str = ""  # where it answered; empty: it never did
    warnings: list[str] = field(default_factory=list)  # one line each, the first ones

    def as_dict(self) -> dict[str, Any]:
        """The JSON line on stdout."""
        return {
            "status": self.status,
            "exit_code": self.exit_code,
            "url": self.url,
            "warnings": self.warnings,
            "message": self.message,
        }
