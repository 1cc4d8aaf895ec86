"""What an output holds beside the results of its input: those of shards that left it, other files.

Whoever reads all files there reads those too, and no total counts them, so each start says so.
Must not know: leases. Invariant: nothing here writes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from batchinfer.errors import ConfigError
from batchinfer.ledger import Results, Survey
from batchinfer.runner.decide import Resume
from batchinfer.runner.input import InputView
from batchinfer.runner.look import RunRecord
from batchinfer.source import Fingerprint

logger = logging.getLogger("batchinfer.runner")

_FOOTER_THREADS = 16
_MAX_NAMED = 3


@dataclass(frozen=True, slots=True)
class Beside:
    """Numbers of results by name of shard; `strange` are keys of files that are not results."""

    finished: Mapping[str, int] = field(default_factory=dict)
    unfinished: Mapping[str, int] = field(default_factory=dict)  # durable in parts only
    strange: Sequence[str] = ()

    def as_dict(self) -> dict[str, dict[str, dict[str, int]]]:
        """For `_SUCCESS`; empty if there is nothing."""
        counts = {"finished": self.finished, "unfinished": self.unfinished}
        found = {
            name: {"shards": len(rows), "rows": sum(rows.values())}
            for name, rows in counts.items()
            if rows
        }
        return {"not_in_input": found} if found else {}


def find_beside(results: Results, survey: Survey, shards: Iterable[str]) -> Beside:
    """`shards`: names of the input's. Reads a footer for each file and part that is beside them."""
    names = frozenset(shards)
    keys = sorted(survey.finished - names)
    with ThreadPoolExecutor(_FOOTER_THREADS, thread_name_prefix="footer") as pool:
        counts = dict(zip(keys, pool.map(lambda key: _num_rows(results, key), keys), strict=True))
    unfinished = sorted(survey.with_parts - survey.finished - names)
    return Beside(
        finished={key: rows for key, rows in counts.items() if rows is not None},
        unfinished={name: results.num_rows_of_parts(name) for name in unfinished},
        strange=[key for key, rows in counts.items() if rows is None],
    )


def _num_rows(results: Results, key: str) -> int | None:
    """None: it is not the finished file of its name."""
    try:
        return results.totals_of(key).rows
    except (ConfigError, FileNotFoundError):
        return None


def warn_of_beside(results: Results, beside: Beside) -> None:
    url = results.store.url
    if beside.finished:
        is_one = len(beside.finished) == 1
        logger.warning(
            "%s %s no longer in the input; %s results stay: %s rows in %s, which no total counts",
            _some_of(list(beside.finished)),
            "is" if is_one else "are",
            "its" if is_one else "their",
            f"{sum(beside.finished.values()):,}",
            url,
        )
    if beside.unfinished:
        is_one = len(beside.unfinished) == 1
        logger.warning(
            "%s left the input before %s finished: %s durable rows of %s are in no result file. "
            "To finish, put the %s back and start again; the rows are kept until then",
            _some_of(list(beside.unfinished)),
            "it was" if is_one else "they were",
            f"{sum(beside.unfinished.values()):,}",
            "it" if is_one else "them",
            "file" if is_one else "files",
        )
    if beside.strange:
        logger.warning(
            "%s in %s %s not of this job, but whoever reads all files there reads %s too: "
            "move away what does not belong there",
            _some_of(beside.strange),
            url,
            "is" if len(beside.strange) == 1 else "are",
            "it" if len(beside.strange) == 1 else "them",
        )


def warn_of_renamed(
    decision: Resume, inputs: InputView, beside: Beside, runs: Iterable[RunRecord]
) -> None:
    """Results stay when their shard comes back under another name, and are computed again.

    Files that an earlier run had beside each other are two, however alike they look.
    """
    known_since: dict[str, int] = dict.fromkeys(decision.unrecorded, 0)
    for run in runs:
        for shard in run.shards if run.number >= decision.first_run else ():
            known_since[shard.name] = min(run.number, known_since.get(shard.name, run.number))
    current: dict[tuple[int, str, int], list[str]] = {}
    for now in inputs.fingerprints.values():
        current.setdefault(_content(now), []).append(now.name)
    renamed = []
    for key in beside.finished:
        if key not in decision.known:
            continue
        since = known_since.get(key, 0)
        later = [
            name
            for name in current.get(_content(decision.known[key]), [])
            if known_since.get(name, since + 1) > since
        ]
        renamed += [f"{key} (now {name})" for name in later[:1]]
    if renamed:
        logger.warning(
            "the output has rows twice: %s, the same input under another name. Give the file its "
            "old name below input.path, or move one of the two results away",
            _some_of(renamed),
        )


def warn_of_rewritten(inputs: InputView) -> None:
    """What is guessed of a file's content is said."""
    if inputs.rewritten:
        is_one = len(inputs.rewritten) == 1
        logger.warning(
            "%s %s rewritten since rows of %s were computed. Size and footer are as before, so "
            "the content is taken to be the same, and those rows stay; if values in it were "
            "changed, compute %s again with --restart or under another name",
            _some_of(inputs.rewritten),
            "was" if is_one else "were",
            "it" if is_one else "them",
            "it" if is_one else "them",
        )


def _content(fingerprint: Fingerprint) -> tuple[int, str, int]:
    return fingerprint.size_bytes, fingerprint.footer_sha256, fingerprint.num_rows


def _some_of(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
