"""What is done, leases, resume, finished files. Must not know: engines."""

from batchinfer.ledger.holder import Holder
from batchinfer.ledger.keys import Keys
from batchinfer.ledger.layout import PartId
from batchinfer.ledger.lease import Lease, acquire_lease
from batchinfer.ledger.ledger import IncompleteShard, Ledger, Survey, count_results
from batchinfer.ledger.records import Totals

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
