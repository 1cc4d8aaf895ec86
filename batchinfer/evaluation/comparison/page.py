"""A comparison as one HTML page: table and pictures in a single file, without scripts or network.

Must not know: how pictures are drawn, where the page goes.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from batchinfer.evaluation.comparison.columns import columns_of, settings_text
from batchinfer.evaluation.record import Record

_TEMPLATE = Path(__file__).with_name("page.html.jinja")


@dataclass(frozen=True, slots=True)
class PagePicture:
    """A picture in both colour schemes, SVG."""

    caption: str
    light: bytes
    dark: bytes


def page_of(records: Sequence[Record], pictures: Sequence[PagePicture], title: str) -> str:
    """The page's HTML."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["data_url"] = _data_url
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=title,
        facts=facts_of(records),
        columns=columns_of(records),
        records=records,
        pictures=pictures,
    )


def facts_of(records: Sequence[Record]) -> str:
    """What was measured, where all records agree on it."""
    measured = [record for record in records if record.error is None]
    if not measured:
        return ""

    def common(name: str) -> object:
        values = {getattr(record, name) for record in measured}
        return values.pop() if len(values) == 1 else None

    facts = [str(data)] if (data := common("data")) else []
    facts += [
        f"{value:,} {unit}"
        for name, unit in (("windows", "windows"), ("tokens", "tokens"))
        if isinstance(value := common(name), int)
    ]
    facts += [
        f"{name} {common(name)}" for name in ("context", "stride") if common(name) is not None
    ]
    facts += [str(value) for name in ("engine", "device") if (value := common(name))]
    if settings := settings_text(records):
        facts.append(settings)
    return ", ".join(facts)


def _data_url(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
