"""`--restart`: all results of an output are deleted, however often it is killed on the way.

The marker says which job asked for it. A start of that job finishes what was begun; a start of any
other is refused, as the results that are left may be its own. Must not know: what is computed
afterwards. Results are only deleted under the lease of the whole output.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from typing import Any

from batchinfer.errors import RESTART, BatchInferError, ConfigError, LeaseHeld, LeaseLost
from batchinfer.ledger import Holder, Lease, Survey, layout, records
from batchinfer.runner.digest import Identity
from batchinfer.runner.start import Start
from batchinfer.storage import Store, join_url

logger = logging.getLogger("batchinfer.runner")

_DELETED_AT_ONCE = 1000


def marker_of(start: Start, holder: Holder) -> bytes:
    """The marker's content: which job asks, by its name and all that decides, when, and who."""
    return records.to_json(
        {
            "restart": True,
            "name": start.job.name,
            "digest": start.identity.digest,
            "asked_at": holder.since,
            "holder": asdict(holder),
            "ingredients": start.identity.ingredients,
            "job": start.job.model_dump(mode="json"),
        }
    )


def read_pending(store: Store) -> dict[str, Any] | None:
    """The marker of a restart that was begun and not finished, None without one.

    That of 0.1.0 says nothing of the job, and neither does a damaged one.
    """
    try:
        return records.read_json(store, layout.RESTART_KEY)
    except ConfigError:
        return {}


def refuse_other_restart(
    url: str, pending: Mapping[str, Any], identity: Identity, *, has_results: bool
) -> None:
    """Raise ConfigError unless the pending restart was asked for by this same job."""
    if records.is_job_record(pending):
        changes = identity.changes_since(pending)
        if not changes:
            return
        who = ", and this job differs from that one:\n  " + "\n  ".join(changes) + "\n"
        ways = ["Start that job again to finish it"]
    else:
        who = ", and nothing says for which job. "
        ways = []
    if has_results:
        ways.append(
            f"to keep the results that are left, delete {join_url(url, layout.RESTART_KEY)} and "
            "start again"
        )
    ways.append(f"to delete them and compute this job here, start it with {RESTART}")
    advice = "; ".join(ways)
    raise ConfigError(
        f"{describe(url, pending)}{who}{advice[0].upper()}{advice[1:]}. This start changed nothing"
    )


def warn_of_pending(url: str, pending: Mapping[str, Any]) -> None:
    """For a start that finishes a restart without having been asked to itself."""
    logger.warning(
        "%s: a start of this job finishes it and deletes the results that are left",
        describe(url, pending),
    )


def describe(url: str, pending: Mapping[str, Any]) -> str:
    """A clause for messages: a restart is pending, who asked for it, and when."""
    name = pending.get("name")
    of_job = f" for the job {name!r}" if isinstance(name, str) else ""
    return f"a --restart of {url}{of_job} is not finished{_asked(pending)}"


def _asked(pending: Mapping[str, Any]) -> str:
    asked_at, record = pending.get("asked_at"), pending.get("holder")
    holder = Holder.from_record(record) if isinstance(record, Mapping) else None
    if holder is not None:
        return f" (by {holder.describe()})"
    return f" (since {asked_at})" if isinstance(asked_at, str) else ""


def delete_results(store: Store, survey: Survey, lease: Lease, marker: bytes) -> None:
    """Delete all results, so that every kill in between is finished by the next start of the job.

    The marker goes first and last; if nothing could be deleted, it is taken back. Run numbers stay:
    a part's name must never come twice. The lease is looked at before each step: what another run
    that took over has written is not deleted. Whatever is not named like ours stays.
    """
    is_begun = store.stat(layout.RESTART_KEY) is not None
    store.put(layout.RESTART_KEY, marker)
    keys = _results(store, survey)
    first = next(keys, None)
    try:
        store.delete([layout.SUCCESS_KEY])
        if first is not None:  # alone: if it cannot be deleted, nothing was
            lease.beat()
            store.delete([first])
            is_begun = True
        while several := list(islice(keys, _DELETED_AT_ONCE)):
            lease.beat()
            store.delete(several)
        lease.beat()
        store.delete([layout.JOB_KEY])
        store.delete([layout.RESTART_KEY])
    except (LeaseHeld, LeaseLost):
        raise
    except BatchInferError:
        if is_begun or not _is_taken_back(store, first):
            logger.warning("%s is not all deleted: start this job again to finish it", store.url)
        raise
    logger.info("restart: earlier results deleted from %s", store.url)


def _results(store: Store, survey: Survey) -> Iterator[str]:
    yield from sorted(survey.finished)
    for prefix in (layout.PARTS_PREFIX, layout.UNREADABLE_PREFIX):
        for info in store.list(prefix):
            as_part = layout.PARTS_PREFIX + info.key.removeprefix(prefix)
            if layout.parse_part_key(as_part) is not None:
                yield info.key


def _is_taken_back(store: Store, first: str | None) -> bool:
    """Delete the marker, unless the deletion that failed was one all the same."""
    with suppress(BatchInferError):
        if first is None or store.stat(first) is not None:
            store.delete([layout.RESTART_KEY])
            return True
    return False
