"""Tables for kernels/README.md from a log of benchmarks.qtip_kernels."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SHAPES = ("qkv", "o", "gate_up", "down")
#: (shape, way) -> tokens -> line of the log.
Times = dict[tuple[str, str, str], dict[int, dict[str, Any]]]


def report(logs: Sequence[Path]) -> str:
    """Markdown of each log: what was right, times beside bf16's, shares of the cost model."""
    return "\n".join(f"## {log.name}\n\n{_report(log)}\n" for log in logs)


def _report(log: Path) -> str:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    times: Times = defaultdict(dict)
    for line in lines:
        kind, _, of = line["section"].partition(":")
        if "way" in line and "tokens" in line and kind in ("speed", "bf16"):
            name = of.removesuffix(":exl3").replace(":", " bits ") or "bf16"
            way = "chosen" if line["way"] == "fused" else line["way"]  # earlier logs' word
            times[name, line["shape"], way][line["tokens"]] = line
    return "\n".join([*_checks(lines), "", *_all_times(times), "", *_shares(times)])


def _checks(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    machine = next(line for line in lines if line["section"] == "machine")
    yield (
        f"{machine['name']}, torch {machine['torch']}, reads {machine['read_tb_per_s']:.2f} TB/s."
    )
    decodes = [line["equal"] for line in lines if line.get("check") == "decode"]
    products = [line for line in lines if line.get("check") == "product"]
    good = sum(line["good"] and line["deterministic"] for line in products)
    yield (
        f"{sum(decodes)} of {len(decodes)} decoded layers equal the reference bit for bit; "
        f"{good} of {len(products)} sets of products are within 1e-3 (float16) and 4e-3 "
        "(bfloat16) of float64, and the same twice."
    )
    failed = [line["section"] for line in lines if "failed" in line or "rc" in line]
    if failed:
        yield f"Failed: {', '.join(sorted(set(failed)))}."


def _all_times(times: Times) -> Iterator[str]:
    names = sorted({name for name, _, _ in times if name != "bf16"})
    for shape in SHAPES:
        yield from _head(f"{shape}, us for tokens:", TOKENS)
        yield _row("bf16, cuBLAS", times["bf16", shape, "bf16"], "us")
        for name in names:
            yield _row(name, times[name, shape, "chosen"], "us")
        for way, title in (("every16", "decoded again for each 16"), ("dense", "decoded, cuBLAS")):
            for name in ("2 bits mcg",):
                yield _row(f"{name}, {title}", times[name, shape, way], "us")
        yield ""


def _shares(times: Times) -> Iterator[str]:
    yield from _head("share of max(bytes, notes' ALU model), gate_up:", TOKENS[:6])
    for name in sorted({name for name, _, _ in times if name != "bf16"}):
        yield _row(name, times[name, "gate_up", "chosen"], "share_of_floor", TOKENS[:6])


def _head(title: str, tokens: Sequence[int]) -> Iterator[str]:
    yield f"| {title} | {' | '.join(map(str, tokens))} |"
    yield "|---" * (1 + len(tokens)) + "|"


def _row(
    title: str, found: dict[int, dict[str, Any]], key: str, tokens: Sequence[int] = TOKENS
) -> str:
    cells = []
    for count in tokens:
        value = found.get(count, {}).get(key)
        cells.append("" if value is None else f"{value:.1f}" if key == "us" else f"{value:.2f}")
    return f"| {title} | {' | '.join(cells)} |"
