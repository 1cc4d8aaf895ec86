"""The columns of a comparison's table, for terminals and pages alike.

Must not know: how a table is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from batchinfer.evaluation.comparison.names import shortened
from batchinfer.evaluation.record import Record

_KL = "KL"
_NAME_CHARS = 40


@dataclass(frozen=True, slots=True)
class Column:
    """`text`: a record's cell, "" where the figure is unknown. `note`: what it means, one line."""

    title: str
    text: Callable[[Record], str]
    note: str = ""
    is_number: bool = True


def columns_of(records: Sequence[Record]) -> list[Column]:
    """The columns that are not empty for every record, and say something of each."""
    known = kl_text(records)
    columns = [replace(c, note=_kl_note(known)) if c.title == _KL else c for c in _ALL]
    if known is None:
        columns.append(Column("KL from", _kl_of, "the reference, and how many tokens", False))
    if settings_text(records) is None:
        columns.append(Column("settings", lambda r: r.settings or "", "of the job", False))
    return [column for column in columns if any(column.text(record) for record in records)]


def kl_text(records: Sequence[Record]) -> str | None:
    """From which reference, with which k. "": there is no KL; None: the records differ in it."""
    found = {_kl_of(record) for record in records} - {""}
    return next(iter(found), "") if len(found) < 2 else None


def settings_text(records: Sequence[Record]) -> str | None:
    """The settings that all measured records have. "": none; None: they differ in them."""
    found = {record.settings or "" for record in records if record.error is None}
    return next(iter(found), "") if len(found) < 2 else None


def notes_of(records: Sequence[Record]) -> list[str]:
    """What a table has no column for, as all its records have it."""
    notes = []
    if known := kl_text(records):
        notes.append(f"{_KL}: {_kl_note(known)}")
    if settings := settings_text(records):
        notes.append(f"settings: {settings}")
    return notes


def _kl_of(record: Record) -> str:
    if record.kl is None:
        return ""
    return f"{shortened(record.reference or 'the reference', _NAME_CHARS)}, k = {record.kl_top_k}"


def _kl_note(known: str | None) -> str:
    return f"divergence from {known or 'the reference'}, nats per token"


def size_text(num_bytes: int | None) -> str:
    """Decimal, as disks and downloads count: 14.0 MB."""
    if num_bytes is None:
        return ""
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def figure_text(value: float | None, digits: int) -> str:
    """With `digits` decimals; beyond 9 digits before them as 1.234e+300."""
    if value is None:
        return ""
    return f"{value:,.{digits}f}" if abs(value) < 1e9 else f"{value:.3e}"


def _number(name: str, digits: int) -> Callable[[Record], str]:
    return lambda record: figure_text(getattr(record, name), digits)


def _interval(record: Record) -> str:
    if record.perplexity_low is None or record.perplexity_high is None:
        return ""
    return f"{figure_text(record.perplexity_low, 3)} to {figure_text(record.perplexity_high, 3)}"


def _share(record: Record) -> str:
    return "" if record.top1_agreement is None else f"{100 * record.top1_agreement:.2f} %"


_ALL = (
    Column("entry", lambda r: r.label, is_number=False),
    Column("perplexity", _number("perplexity", 4), "exp of the mean NLL of a token"),
    Column("95 % interval", _interval, "of the perplexity, over windows of this text"),
    Column("bits/byte", _number("bits_per_byte", 4), "comparable across tokenizers"),
    Column(_KL, _number("kl", 5), "divergence from the reference, nats per token"),
    Column("top-1", _share, "tokens for which both find the same token likeliest"),
    Column("bits/weight", _number("layer_bits_per_weight", 3), "of the decoder layers, as stored"),
    Column("head", _number("head_bits_per_weight", 3), "bits per weight of the head, as stored"),
    Column("size", lambda r: size_text(r.model_bytes), "of all weights, as stored"),
    Column(
        "peak memory",
        lambda r: size_text(r.peak_memory_bytes),
        "of the device, without its KV cache",
    ),
    Column("tokens/s", _number("tokens_per_s", 0), "scored tokens, start-up left out"),
)
