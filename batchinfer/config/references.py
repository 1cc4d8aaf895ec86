"""`$ref` of a JSON Schema: what an engine would not find, and then leave out without a word.

Must not know: which engine applies a schema.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_ANCHORS = ("$anchor", "$dynamicAnchor")
#: Keywords whose values are data: a "$ref" in them is none.
_DATA = frozenset({"const", "enum", "default", "examples"})
#: … whose values map names to schemas: a property may be called "$ref".
_NAMED = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"}
)


def reference_problem(schema: Mapping[str, Any]) -> str | None:
    """The first reference that leaves the schema or leads nowhere in it, and what to do."""
    subschemas = list(_subschemas(schema))
    anchors = {found.get(key) for found in subschemas for key in _ANCHORS}
    for found in subschemas:
        for key in _REFERENCES:
            target = found.get(key)
            if not isinstance(target, str):
                continue
            if not target.startswith("#"):
                return (
                    f"{key} {target!r} is not in the schema, and none is fetched: put it in $defs"
                )
            if target[1:] not in anchors and not _leads_somewhere(schema, target[1:]):
                return f"{key} {target!r} leads nowhere in the schema"
    return None


def _subschemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    pending = [schema]
    while pending:
        found = pending.pop()
        if isinstance(found, Mapping):
            yield found
            for key, value in found.items():
                if key in _NAMED and isinstance(value, Mapping):
                    pending += value.values()
                elif key not in _DATA:
                    pending.append(value)
        elif isinstance(found, Sequence) and not isinstance(found, str):
            pending += found


def _leads_somewhere(schema: Any, pointer: str) -> bool:
    """RFC 6901, percent-encoded as a fragment is."""
    if pointer and not pointer.startswith("/"):
        return False
    for part in unquote(pointer).split("/")[1:]:
        step = part.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, Mapping) and step in schema:
            schema = schema[step]
        elif isinstance(schema, Sequence) and step.isdecimal() and int(step) < len(schema):
            schema = schema[int(step)]
        else:
            return False
    return True
