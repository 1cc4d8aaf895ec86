"""What a shard looked like when its rows were computed, and whether it still is the same.

Must not know: where fingerprints are kept. A false "same" would mix results of two inputs, a false
"changed" only stops a run with a message, so in doubt the answer is "changed".
"""

from __future__ import annotations

from dataclasses import dataclass

from batchinfer.source.footer import read_footer
from batchinfer.source.shards import Shard


@dataclass(frozen=True, slots=True)
class Fingerprint:
    name: str
    size_bytes: int
    version: str
    num_rows: int
    footer_sha256: str


def same_content(old: Fingerprint, shard: Shard) -> bool:
    """Whether the shard is what `old` describes. Reads a local footer if only its time differs.

    A copied file has another mtime and the same footer; on S3 another ETag is another object. A
    footer has sizes and bounds of columns: values changed within them leave it as it is.
    """
    if old.size_bytes != shard.size_bytes:
        return False
    if old.version == shard.version:
        return True
    return shard.store.is_local and read_footer(shard).sha256 == old.footer_sha256
