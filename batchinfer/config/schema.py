"""The JSON Schema of the job file, draft 7: the newest that editors' YAML language server knows.

Must not know: anything but the models. Invariant: `schemas/job.schema.json` holds exactly
`job_schema_text()`; a test compares them.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from batchinfer.config.job import Job

DRAFT_7 = "http://json-schema.org/draft-07/schema#"

#: Added to the description of what decides results, by what it decides.
_FROZEN: dict[str, str] = {
    "value": "Frozen: an output that was begun with another value is refused.",
    "resolved": "Frozen as resolved.",
    "content": "Its content is frozen.",
}


class _WithoutTitles(GenerateJsonSchema):
    """Leaves out the titles that pydantic derives from field names: they push the text aside."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def job_schema() -> dict[str, Any]:
    """The schema as plain data."""
    schema = _to_draft_7(Job.model_json_schema(schema_generator=_WithoutTitles))
    for definition in schema["definitions"].values():
        del definition["title"]
    return {"$schema": DRAFT_7, **schema, "title": "batchinfer job"}


def job_schema_text() -> str:
    """The content of `schemas/job.schema.json`."""
    return json.dumps(job_schema(), indent=2, ensure_ascii=False) + "\n"


def _to_draft_7(schema: Any) -> Any:
    """`$defs` become `definitions`; a $ref with siblings is wrapped: draft 7 ignores siblings."""
    if isinstance(schema, list):
        return [_to_draft_7(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    converted = {
        "definitions" if key == "$defs" else key: _to_draft_7(part) for key, part in schema.items()
    }
    converted.pop("reads_column", None)
    if by := converted.pop("decides_results", None):
        converted["description"] += f" {_FROZEN[by]}"
    reference = converted.get("$ref")
    if isinstance(reference, str):
        reference = reference.replace("#/$defs/", "#/definitions/")
        if len(converted) == 1:
            return {"$ref": reference}
        converted["allOf"] = [{"$ref": reference}]
        del converted["$ref"]
    return converted
