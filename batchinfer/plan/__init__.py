"""Which row is admitted when. Must not know: how anything is read, run or written."""

from batchinfer.plan.chunk import Chunk, WorkItem, seed_of
from batchinfer.plan.order import find_duplicates, order_rows

__all__ = ["Chunk", "WorkItem", "find_duplicates", "order_rows", "seed_of"]
