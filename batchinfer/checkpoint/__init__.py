"""What is done, leases, resume, finished files. Must not know: engines."""

from batchinfer.checkpoint.holder import Holder
from batchinfer.checkpoint.keys import Keys
from batchinfer.checkpoint.layout import PartId
from batchinfer.checkpoint.lease import Lease, acquire_lease
from batchinfer.checkpoint.ledger import IncompleteShard, Ledger, Survey, count_results
from batchinfer.checkpoint.records import Totals

__all__ = [
    "Holder",
    "IncompleteShard",
    "Keys",
    "Lease",
    "Ledger",
    "PartId",
    "Survey",
    "Totals",
    "acquire_lease",
    "count_results",
]
