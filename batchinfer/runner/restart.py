"""`--restart`: all results of an output are deleted, however often it is killed on the way.

Must not know: what is computed afterwards. Only called under the lease of the whole output.
"""

from __future__ import annotations

import logging

from batchinfer.ledger import Lease, Survey, layout, records
from batchinfer.storage import Store

logger = logging.getLogger("batchinfer.runner")


def delete_results(store: Store, survey: Survey, lease: Lease) -> None:
    """Delete all results, so that every kill in between is finished by the next start.

    The marker goes first and last. Run numbers stay: a part's name must never come twice. The lease
    is looked at before each step: what another run that took over has written is not deleted.
    """
    store.create(layout.RESTART_KEY, records.to_json({"restart": True}))
    store.delete([layout.SUCCESS_KEY])
    for key in sorted(survey.finished):
        lease.beat()
        store.delete([key])
    for prefix in (layout.PARTS_PREFIX, layout.UNREADABLE_PREFIX):
        lease.beat()
        store.delete(info.key for info in store.list(prefix))
    lease.beat()
    store.delete([layout.JOB_KEY])
    store.delete([layout.RESTART_KEY])
    logger.info("restart: earlier results deleted from %s", store.url)
