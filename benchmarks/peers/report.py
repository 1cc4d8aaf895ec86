"""From measurements to a report (JSON) and its table (text and Markdown are the same).

Ratios are of the best runs: what else the machine does only ever adds. Wins and losses of
`batchinfer run` are both spelled out below the table.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.common import heading, machine, versions
from benchmarks.peers.contenders import BASE, CONTENDERS, peer_versions
from benchmarks.peers.work import LIMITS, MODEL_ARGUMENTS, SAMPLING

OURS = "batchinfer"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One undisturbed run. `durable_s` and `cpu_s` count from the first admission on."""

    generation_s: float  # to the last finish
    generation_cpu_s: float  # until then, of all processes
    durable_s: float  # until the last file of the output has its name
    cpu_s: float  # until then, of all processes
    job_s: float  # from the start of the command until then
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Killed:
    """A run that was killed half-way, and its second start. Counts of rows."""

    share_done: float  # of the CPU seconds that generation takes undisturbed
    num_on_disk: int  # at the kill, whole and readable
    failure: str  # of the second start, "" if it came to its end
    num_computed: int  # by the second start
    num_missing: int  # after it
    num_duplicated: int


def make_report(
    measured: Mapping[str, Sequence[Measurement]],
    killed: Mapping[str, Killed],
    left_out: Mapping[str, str],
    *,
    lengths: list[int],
) -> dict[str, Any]:
    lengths = sorted(lengths)
    base = measured[BASE]
    contenders = {}
    for name, runs in measured.items():
        contenders[name] = {
            "what": CONTENDERS[name].what,
            "note": CONTENDERS[name].note,
            "runs": [asdict(run) for run in runs],
            "time_ratio": min(r.durable_s for r in runs) / min(b.durable_s for b in base),
            "generation_ratio": min(r.generation_s for r in runs)
            / min(b.generation_s for b in base),
            "cpu_ratio": min(r.cpu_s for r in runs) / min(b.cpu_s for b in base),
            "killed": asdict(killed[name]) if name in killed else None,
        }
    return {
        "heading": ", ".join([heading(), *(f"{n} {v}" for n, v in peer_versions().items())]),
        "machine": machine(),
        "versions": versions() | peer_versions(),
        "settings": {"model": MODEL_ARGUMENTS, "limits": LIMITS, "sampling": SAMPLING},
        "rows": len(lengths),
        "completion_tokens": sum(lengths),
        "completion_length": {
            "median": statistics.median(lengths),
            "mean": statistics.mean(lengths),
            "p95": lengths[int(0.95 * len(lengths))],
            "max": lengths[-1],
        },
        "contenders": contenders,
        "left_out": dict(left_out),
    }


def table(report: Mapping[str, Any]) -> str:
    length, contenders = report["completion_length"], report["contenders"]
    lines = [
        report["heading"],
        "",
        f"{report['rows']:,} prompts, {report['completion_tokens']:,} completion tokens (median "
        f"{length['median']:.0f}, mean {length['mean']:.0f}, p95 {length['p95']}, max "
        f"{length['max']}); the same completions in all runs.",
        "",
        "| | time | CPU | tokens/s to disk | whole job, s | on disk at kill -9 "
        "| second start computes | in the end |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for contender in contenders.values():
        runs = contender["runs"]
        rates = [run["num_tokens"] / run["durable_s"] for run in runs]
        job_s = _best(contender, "job_s")
        note = f" ({contender['note']})" if contender["note"] else ""
        lines.append(
            f"| {contender['what']}{note} | {contender['time_ratio']:.3f} "
            f"| {contender['cpu_ratio']:.3f} | {statistics.median(rates):,.0f} "
            f"({min(rates):,.0f} to {max(rates):,.0f}, n={len(rates)}) | {job_s:.1f} "
            f"| {_killed(contender['killed'], report['rows'])} |"
        )
    lines += [
        f"| {CONTENDERS[n].what} | {why} | | | | | | |" for n, why in report["left_out"].items()
    ]
    if OURS in contenders:
        lines += ["", _wins_and_losses(contenders)]
    return "\n".join(lines)


def _killed(killed: Mapping[str, Any] | None, num_rows: int) -> str:
    if killed is None:
        return "| |"
    if killed["failure"]:
        return f"{killed['num_on_disk']} of {num_rows} | {killed['failure']} | |"
    end = "all rows once"
    if killed["num_missing"] or killed["num_duplicated"]:
        end = f"**{killed['num_missing']} missing, {killed['num_duplicated']} twice**"
    return f"{killed['num_on_disk']} of {num_rows} | {killed['num_computed']} | {end}"


def _wins_and_losses(contenders: Mapping[str, Any]) -> str:
    ours = contenders[OURS]
    others = {name: c for name, c in contenders.items() if name != OURS}
    lines = []
    for what, key in (
        ("Time to disk", "durable_s"),
        ("CPU time", "cpu_s"),
        ("Whole job", "job_s"),
    ):
        ratios = {c["what"]: _best(c, key) / _best(ours, key) for c in others.values()}
        wins = [f"{name} {ratio:.2f}" for name, ratio in ratios.items() if ratio >= 1]
        losses = [f"{name} {ratio:.2f}" for name, ratio in ratios.items() if ratio < 1]
        lines.append(
            f"- {what}, others over batchinfer: **behind it** {', '.join(wins) or 'none'}; "
            f"**ahead of it** {', '.join(losses) or 'none'}."
        )
    if killed := {name: c for name, c in contenders.items() if c["killed"]}:
        kept = {name: c["killed"]["num_on_disk"] for name, c in killed.items()}
        fewer = [f"{c['what']} {kept[n]}" for n, c in killed.items() if kept[n] < kept[OURS]]
        more = [f"{c['what']} {kept[n]}" for n, c in killed.items() if kept[n] > kept[OURS]]
        lines.append(
            f"- Rows kept at the kill, batchinfer {kept[OURS]}: **behind it** "
            f"{', '.join(fewer) or 'none'}; **ahead of it** {', '.join(more) or 'none'}."
        )
    return "\n".join(lines)


def _best(contender: Mapping[str, Any], key: str) -> float:
    return min(float(run[key]) for run in contender["runs"])
