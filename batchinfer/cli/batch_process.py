"""`batchinfer run-batch`: the process of a run, with the lines before it and the answers after.

Must not know: what a line or an answer is.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from batchinfer.cli.run import RunProcess
from batchinfer.cli.source import JobSource
from batchinfer.config import Fixed, Job
from batchinfer.errors import ConfigError
from batchinfer.ledger import Holder
from batchinfer.openai_batch import Batch, BatchFiles
from batchinfer.runner import InputChanged, Run, RunOptions
from batchinfer.telemetry import Outcome

logger = logging.getLogger("batchinfer.cli")

#: What the batch says itself. A variable may say input.s3 and output.s3 for other jobs.
_FIXED = Fixed(
    ("input", "prompt", "output", "task", "sampling.n", "sampling.per_row"),
    without_bearing=("input.s3", "output.s3"),
    why="the batch file says that, line by line",
)


class BatchProcess(RunProcess):
    """The process of one `batchinfer run-batch`."""

    def __init__(self, source: JobSource, given: dict[str, Any]) -> None:
        """`given`: the options besides the job's, by name."""
        self._given = given
        options = RunOptions(restart=given["restart"], retry_failed=given["retry_failed"])
        super().__init__(source, options, quiet=False, json_lines=False)
        self._batch: Batch | None = None

    def _next_steps(self, outcome: Outcome) -> dict[str, str]:
        return {}

    def _load(self) -> Job:
        given, source = self._given, self._source
        files = BatchFiles.of(given["input_"], given["output"], given["errors"])
        self._output = str(files.output.absolute())
        batch = self._batch = Batch(files, given["served_name"], given["chat_template"])
        self._host.counters.set_phase("reading the batch file")
        loaded = source.load(batch.otherwise(), _FIXED)
        found = batch.prepare(
            loaded, Holder.current(self._host.clock.utc()), is_restart=given["restart"]
        )
        logger.info(
            "%s: %d lines, %d of them cannot be asked",
            files.source,
            found.num_lines,
            found.num_refused,
        )
        return source.load(batch.otherwise(), _FIXED).job

    def _computed(self, run: Run) -> Outcome:
        assert self._batch is not None
        try:
            return super()._computed(run)
        except InputChanged as error:  # only a restart replaces the lines
            raise ConfigError(
                f"{self._batch.files.folder} has the lines of this input and the results of "
                "another one: a --restart was not finished. Start with --restart, which deletes "
                "those results, or choose another -o"
            ) from error

    def _finish(self, outcome: Outcome) -> Outcome:
        assert self._batch is not None
        if outcome.status == "complete":
            written, files = self._batch.finish(), self._batch.files
            text = f"{written.num_answers} answers in {files.output}"
            if written.errors:
                kinds = ", ".join(f"{count} {code}" for code, count in written.errors.most_common())
                text += f", {written.num_errors} errors in {files.errors} ({kinds})"
            logger.info("%s", text)
            outcome = replace(outcome, message="; ".join(filter(None, (outcome.message, text))))
        outcome.output = self._output
        return outcome
