"""What the first rows become, before a model is loaded: the tokenizer, its chat template, a look.

Must not know: leases, engines. Reads one block of one shard.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from batchinfer.runner.remarks import RemarkWarnings
from batchinfer.runner.shown import ShownPrompts
from batchinfer.runner.start import Start
from batchinfer.source import Shard, ShardReader

logger = logging.getLogger("batchinfer.runner")

_NUM_ROWS = 64


def check_first_rows(start: Start, shards: Sequence[tuple[Shard, int]]) -> None:
    """Make prompts of the first rows, and warn of what is odd or wrong with them.

    `shards`: with their numbers of rows. Raises ConfigError for what would fail in every row.
    """
    prompter = start.task.prompter(start.job, start.model)
    shard, num_rows = next(((s, n) for s, n in shards if n), (None, 0))
    if shard is None:
        return
    with ShardReader(shard, list(prompter.columns), start.row_filter) as reader:
        block = next(iter(reader.blocks(0, min(num_rows, _NUM_ROWS))))
    if not len(block.rows):
        logger.warning(
            "input.filter %r keeps none of the first %d rows of %s: no prompt was tried",
            start.job.input.filter,
            min(num_rows, _NUM_ROWS),
            shard.name,
        )
        return
    prepared = prompter.prepare(block.table)
    ShownPrompts(prompter).show(shard.name, block.rows, prepared)
    RemarkWarnings().check(shard.name, block.rows, prepared.remarks)
    if prepared.errors:
        index, error = next(iter(prepared.errors.items()))
        logger.warning(
            "%d of the first %d rows would be errors, the first %s:%d %s: %s",
            len(prepared.errors),
            len(block.rows),
            shard.name,
            int(block.rows[index]),
            error.kind,
            error.message,
        )
