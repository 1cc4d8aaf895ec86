"""How far a run was from what its device can do, what bound it, and which setting would help.

Telemetry counts what the steps did (`Tally`); here it is judged, from plain numbers. Must not
know: files, rows, how an engine works.
"""

from batchinfer.verdict.judge import judge
from batchinfer.verdict.measured import Measure, cpu_name, peaks_of
from batchinfer.verdict.peaks import Peaks
from batchinfer.verdict.setup import Setup, setup_of
from batchinfer.verdict.verdict import Lever, Verdict
from batchinfer.verdict.work import ModelWork, work_of

__all__ = [
    "Lever",
    "Measure",
    "ModelWork",
    "Peaks",
    "Setup",
    "Verdict",
    "cpu_name",
    "judge",
    "peaks_of",
    "setup_of",
    "work_of",
]
