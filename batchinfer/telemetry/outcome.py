"""How a start ended: what the JSON line on stdout says.

Must not know: who ends, or why. Nothing heavy is imported here: a start that failed before it began
prints the line too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchinfer.ledger import Totals


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
    rows_cut: int = 0  # likewise: ended by sampling.max_tokens
    rows_unparsed: int = 0  # likewise: no whole JSON document although there is a schema
    rows_empty: int = 0  # of this run: without text
    rows_computed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    generation_s: float = 0.0
    stalled_s: float = 0.0
    steps: int = 0
    mean_num_running: float = 0.0
    share_of_steps_underfilled: float = 0.0
    startup_s: float | None = None  # from the command to the end of the first engine step
    warnings: list[str] = field(default_factory=list)  # one line each, the first ones

    def as_dict(self) -> dict[str, Any]:
        """The JSON line on stdout."""
        speed = self.completion_tokens / self.generation_s if self.generation_s else 0.0
        return {
            "status": self.status,
            "exit_code": self.exit_code,
            "run": self.run,
            "rows": self.totals.rows if self.totals else self.rows_durable,
            "rows_failed": self.totals.rows_failed if self.totals else self.rows_failed,
            "rows_cut": self.totals.rows_cut if self.totals else self.rows_cut,
            "rows_unparsed": self.totals.rows_unparsed if self.totals else self.rows_unparsed,
            "rows_computed": self.rows_computed,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "generation_s": round(self.generation_s, 3),
            "completion_tokens_per_s": round(speed, 1),
            "steps": self.steps,
            "mean_num_running": round(self.mean_num_running, 1),
            "share_of_steps_underfilled": round(self.share_of_steps_underfilled, 4),
            "stalled_s": round(self.stalled_s, 3),
            "startup_s": None if self.startup_s is None else round(self.startup_s, 3),
            "output": self.output,
            "warnings": self.warnings,
            "message": self.message,
        }
