"""The records that a start writes: job.json, its own runs/NNNN.json; and again if they vanish.

Must not know: leases, what is computed. Invariant: each is created if absent, so of two starts at
one moment one writes it, and the other continues with that or ends.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

from batchinfer import __version__
from batchinfer.errors import ConfigError, TransientError
from batchinfer.ledger import Holder, layout, records
from batchinfer.model import weight_marks
from batchinfer.runner.begun import differs_by_machine
from batchinfer.runner.carried import RECORD_KEY, to_text
from batchinfer.runner.decide import Resume, other_settings
from batchinfer.runner.input import InputView
from batchinfer.runner.look import WEIGHTS_KEY
from batchinfer.runner.start import Start
from batchinfer.source import Fingerprint
from batchinfer.storage import Store

logger = logging.getLogger("batchinfer.runner")


def write_job_record(start: Start, decision: Resume, inputs: InputView, created_at: str) -> bytes:
    """Create job.json; what it is then. Raises if another start began with something else."""
    carried = inputs.carried
    has_weights = start.kind.needs_weights(start.job)
    created = {
        "name": start.job.name,
        "digest": decision.digest,
        "window_rows": decision.window_rows,
        "first_run": decision.first_run,
        "created_at": created_at,
        "ingredients": start.identity.ingredients,
        "job": start.job.model_dump(mode="json"),
        **({WEIGHTS_KEY: weight_marks(start.model.path)} if has_weights else {}),
        **({RECORD_KEY: to_text(carried)} if carried is not None else {}),
    }
    store = start.store
    content = records.to_json(created)
    if store.create(layout.JOB_KEY, content):
        return content
    earlier = records.read_job(store)
    if earlier is not None and start.options.is_whole:
        store.delete([layout.JOB_KEY])  # it binds nobody: it has no result, see decide
        store.create(layout.JOB_KEY, content)
        return content
    if earlier is not None and (changes := start.identity.changes_since(earlier)):
        if differs_by_machine(changes):
            raise TransientError(
                f"another start began {store.url} at the same moment, on a machine where "
                "model.dtype or model.quantization became another: start again to continue in it"
            )
        raise other_settings(store.url, changes)
    bound = ("digest", "window_rows", RECORD_KEY)
    if earlier is None or any(earlier.get(name) != created.get(name) for name in bound):
        raise TransientError(
            f"another run began {store.url} at the same moment, with another packing.window_rows, "
            "other input files or another version of batchinfer: start again"
        )
    return records.to_json(earlier)


def number_run(
    start: Start, decision: Resume, holder: Holder, new: Sequence[Fingerprint], last_run: int
) -> tuple[int, bytes]:
    """Create runs/NNNN.json; its number is ours, because the file was created if absent.

    `last_run`: the highest number that anything in the output is named by.
    """
    record: dict[str, Any] = {
        "started_at": holder.since,
        "holder": asdict(holder),
        "options": asdict(start.options),
        "versions": _versions(),
        "digest": decision.digest,
        "job": start.job.model_dump(mode="json"),
        "input": [records.fingerprint_record(f) for f in new],
    }
    while True:
        number = max(_last_run(start.store), last_run) + 1
        content = records.to_json({"run": number, **record})
        if start.store.create(layout.run_key(number), content):
            return number, content


def _last_run(store: Store) -> int:
    numbers = (layout.run_of_key(info.key) for info in store.list(layout.RUNS_PREFIX))
    return max((n for n in numbers if n is not None), default=0)


def _versions() -> dict[str, str]:
    versions = {"batchinfer": __version__}
    for name in ("pyarrow", "polars"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def restore(store: Store, written: Mapping[str, bytes]) -> None:
    """Write records again that somebody deleted while the run that wrote them works."""
    for key, content in written.items():
        if store.stat(key) is None and store.create(key, content):
            logger.warning("%s was deleted while the run worked: written again", store.url_of(key))


def warn_of_damage(store: Store, written: Mapping[str, bytes]) -> None:
    """Say which records were damaged while the run that wrote them worked.

    Its results are right: it read them once, and every part names what they say. They are not
    written again, unlike deleted ones: who wrote there may be at work, and the next start refuses
    them by the same sentence.
    """
    for key in written:
        try:
            if key == layout.JOB_KEY:
                records.read_job(store)
            else:
                records.read_run(store, key)
        except ConfigError as error:
            logger.warning("while the run worked, a record of it was overwritten: %s", error)
