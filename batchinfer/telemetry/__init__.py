"""What people and machines see of a run: counters, logs, progress, the status record.

Must not know: who calls it.
"""

from batchinfer.telemetry.clock import Clock, utc_seconds, utc_text
from batchinfer.telemetry.counters import Counters, Snapshot
from batchinfer.telemetry.logs import Logs, Warnings, log_event
from batchinfer.telemetry.outcome import UNKNOWN_TASK, Outcome, ServerOutcome
from batchinfer.telemetry.progress import Progress, choose_display
from batchinfer.telemetry.startup import StartUp
from batchinfer.telemetry.status import describe, status_record
from batchinfer.telemetry.stdio import Stdio
from batchinfer.telemetry.sums import Sums
from batchinfer.telemetry.tally import Steps, Tallied, Tally, Tokens

__all__ = [
    "UNKNOWN_TASK",
    "Clock",
    "Counters",
    "Logs",
    "Outcome",
    "Progress",
    "ServerOutcome",
    "Snapshot",
    "StartUp",
    "Stdio",
    "Steps",
    "Sums",
    "Tallied",
    "Tally",
    "Tokens",
    "Warnings",
    "choose_display",
    "describe",
    "log_event",
    "status_record",
    "utc_seconds",
    "utc_text",
]
