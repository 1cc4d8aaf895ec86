"""Read files with bits flipped, as a run does: `-m tests.support.damage FILE N COLUMN…`.

A process of its own, as damage may end it. Prints how often each outcome came; exits with 0 if each
file was read or refused by name.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from batchinfer.errors import ConfigError
from batchinfer.source import ShardReader, check_columns, list_shards, read_footer, with_valid_text
from batchinfer.storage import open_store


def damaged(content: bytes, seed: int) -> bytes:
    """One to sixteen bits flipped, most of them in the footer: there each bit matters."""
    chance = random.Random(seed)
    changed = bytearray(content)
    num_footer_bytes = int.from_bytes(content[-8:-4], "little")
    for _ in range(chance.choice([1, 1, 1, 2, 4, 16])):
        low, high = (0, len(content)) if chance.random() < 0.4 else (-8 - num_footer_bytes, -8)
        changed[chance.randrange(low, high)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def read(path: Path, names: Sequence[str]) -> str:
    try:
        (shard,) = list_shards([str(path)], open_store)
        footer = read_footer(shard)
        check_columns(footer, names, shard)
        with ShardReader(shard, names) as reader:
            for block in reader.blocks(0, reader.num_rows):
                for column in block.table.columns:
                    with_valid_text(column)
    except ConfigError as error:
        assert path.name in str(error), error
        return "refused"
    return "read"


def main(source: Path, num_files: int, names: Sequence[str]) -> None:
    pa.set_cpu_count(1)
    content = source.read_bytes()
    outcomes: Counter[str] = Counter()
    path = source.with_name("damaged.parquet")
    for seed in range(num_files):
        sys.stderr.write(f"{seed}\n")  # the last one is what ended the process
        path.write_bytes(damaged(content, seed))
        outcomes[read(path, names)] += 1
    sys.stdout.write(f"{dict(outcomes)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
