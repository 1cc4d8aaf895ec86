"""What is done, leases, resume, finished files. Must not know: engines."""

from batchinfer.ledger.holder import Holder
from batchinfer.ledger.keys import Keys
from batchinfer.ledger.layout import PartId
from batchinfer.ledger.lease import Lease, acquire_lease
from batchinfer.ledger.ledger import Ledger
from batchinfer.ledger.listing import Survey, survey
from batchinfer.ledger.members import acquire_joint, clear_members
from batchinfer.ledger.piece_leases import clear_pieces
from batchinfer.ledger.records import Totals
from batchinfer.ledger.results import (
    Results,
    list_parts,
    named_if_damaged,
    read_facts,
    read_schema,
)
from batchinfer.ledger.shard_fold import IncompleteShard

__all__ = [
    "Holder",
    "IncompleteShard",
    "Keys",
    "Lease",
    "Ledger",
    "PartId",
    "Results",
    "Survey",
    "Totals",
    "acquire_joint",
    "acquire_lease",
    "clear_members",
    "clear_pieces",
    "list_parts",
    "named_if_damaged",
    "read_facts",
    "read_schema",
    "survey",
]
