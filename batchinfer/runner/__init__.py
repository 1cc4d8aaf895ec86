"""One run of a job: read, render, submit, step, write, commit. Must not know: click, terminals."""

from batchinfer.runner.options import RunOptions
from batchinfer.runner.process import Process
from batchinfer.runner.run import Run, run_job
from batchinfer.runner.startup import WholeProcess
from batchinfer.runner.stop import Stop

__all__ = ["Process", "Run", "RunOptions", "Stop", "WholeProcess", "run_job"]
