"""`perplexity`: measure, and print the record as JSON on stdout.

Must not know: how anything is measured. What the engine prints goes to a log in the work folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from batchinfer.cli.debug import is_debug
from batchinfer.cli.warned import held_warnings
from batchinfer.config.yaml12 import load_yaml
from batchinfer.evaluation.bits import Bits, read_bits, table
from batchinfer.evaluation.folders import local_folder
from batchinfer.evaluation.perplexity import prepare
from batchinfer.evaluation.record import PerplexityRequest
from batchinfer.storage.local_errors import os_errors
from batchinfer.telemetry import Stdio


def show_perplexity(
    request: PerplexityRequest, work: str | None, *, restart: bool, layers: bool
) -> None:
    """Raises what `measure` raises."""
    folder = None if work is None else local_folder("--work", work)
    with held_warnings():
        measurement = prepare(request, folder, restart=restart)
        if layers:
            show_layers(read_bits(request.model))
        measurement.begin()
        if not measurement.is_finished:
            click.echo(
                f"computing in {measurement.output} (`batchinfer status` shows how far)", err=True
            )
        with _logged(measurement.work / "engine.log"):
            record = measurement.compute()
    click.echo(record.model_dump_json(indent=2))


def settings_of(sets: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE, the value in YAML. Raises UsageError."""
    settings = {}
    for text in sets:
        key, separator, value = text.partition("=")
        if not separator:
            raise click.UsageError(f"--set {text}: write KEY=VALUE")
        settings[key.strip()] = load_yaml(value, f"--set {text}").data
    return settings


def show_layers(bits: Bits) -> None:
    """A line for each module, equal layers in one."""
    for name, kind, num_weights, num_bytes, per_weight in table(bits):
        mean = "" if per_weight is None else f"{per_weight:8.3f} bits"
        click.echo(f"{name:48} {kind:6} {num_weights:14,} {num_bytes:14,} bytes {mean}", err=True)


@contextmanager
def _logged(log: Path) -> Iterator[None]:
    """Lead what libraries and the engine print to a log; stdout is for the record."""
    with os_errors("write", log):
        stdio = Stdio(follows=is_debug())
        stdio.redirect(log)
    try:
        yield
    except BaseException:
        stdio.err.write(f"the output of the engine is in {log}\n")
        raise
    finally:
        stdio.close()
