"""`schema`: the generated files in `schemas/`, which a test compares with what the code says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from batchinfer.config import job_schema_text
from batchinfer.config.columns import column_settings
from batchinfer.errors import ROW_ERROR_KINDS, ConfigError
from batchinfer.sink import output_columns
from batchinfer.tasks import TASKS, Column


def schema_files() -> dict[str, str]:
    """File name in `schemas/` -> its text."""
    return {
        "job.schema.json": job_schema_text(),
        "output.schema.json": _text(_output_schema()),
        "input.schema.json": _text(_input_schema()),
    }


def print_or_write(*, write: bool) -> None:
    files = schema_files()
    if not write:
        click.echo(files["job.schema.json"], nl=False)
        return
    folder = Path("schemas")
    if not folder.is_dir():
        raise ConfigError("no folder ./schemas here: run this in the root of the repository")
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
        click.echo(str(folder / name))


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _output_schema() -> dict[str, Any]:
    columns = [
        {
            "name": "id",
            "type": "as in the input; string without input.id_column",
            "description": "input.id_column, else shard:row",
        },
        {
            "name": "<kept columns>",
            "type": "as in the input",
            "description": "input.keep_columns, in their order",
        },
    ]
    return {
        "title": "Columns of finished files and parts (Arrow types), in order",
        "key": ["shard", "row", "sample"],
        "columns": [*columns, *_described(output_columns(TASKS["generate"].columns))],
        "columns_of_other_tasks": {  # between `sample` and `queued_s`
            task: _described(kind.columns) for task, kind in TASKS.items() if task != "generate"
        },
        "error_type": ROW_ERROR_KINDS,
    }


def _described(columns: Mapping[str, Column]) -> list[dict[str, str]]:
    return [
        {"name": name, "type": str(data_type), "description": description}
        for name, (data_type, description) in columns.items()
    ]


def _input_schema() -> dict[str, Any]:
    return {
        "title": "Columns that an input file needs, by the job's keys (Arrow types)",
        "columns": [
            {"for": key, "type": data_type, "description": description}
            for key, data_type, description in column_settings()
        ],
    }
