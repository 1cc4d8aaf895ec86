"""Which row is admitted when. Must not know: how anything is read, run or written."""

from batchinfer.plan.buffer import Buffer, plan_buffer
from batchinfer.plan.chunk import Chunk, OwnWay, WorkItem, own_seed, request_seed

__all__ = ["Buffer", "Chunk", "OwnWay", "WorkItem", "own_seed", "plan_buffer", "request_seed"]
