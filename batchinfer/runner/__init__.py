"""One run of a job: read, render, submit, step, write, commit. Must not know: click, terminals."""

from batchinfer.runner.host import Host
from batchinfer.runner.input import InputChanged
from batchinfer.runner.options import RunOptions
from batchinfer.runner.run import Run, run_job
from batchinfer.runner.stop import Stop
from batchinfer.runner.tuning import WholeProcess

__all__ = ["Host", "InputChanged", "Run", "RunOptions", "Stop", "WholeProcess", "run_job"]
