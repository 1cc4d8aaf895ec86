"""What is wrong with a JSON Schema that completions are to fit: keywords that it cannot have, and a
`$ref` that an engine would not find, and then leave out without a word.

Must not know: which engine applies a schema.
"""

from __future__ import annotations

import re
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


_VERSION = re.compile(r"https?://json-schema\.org/(draft-0[467]|draft/(2019-09|2020-12))/schema#?")


def schema_problem(schema: Mapping[str, Any]) -> str | None:
    """The first keyword whose value its version of JSON Schema (that of `$schema`, else 2020-12)
    does not allow, and where it is. Patterns are not checked: each engine has its own dialect.
    """
    import jsonschema_rs

    version = schema.get("$schema", "https://json-schema.org/draft/2020-12/schema")
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        return (
            f"/$schema: {version!r} is not a known version of JSON Schema: draft-04, draft-06, "
            "draft-07, 2019-09 and 2020-12 are, by their URLs (leave it out for 2020-12)"
        )
    try:
        jsonschema_rs.meta.validate(dict(schema))
    except jsonschema_rs.ValidationError as error:
        where = "".join(f"/{step}" for step in error.instance_path)
        return f"is not a valid JSON Schema: {where or '/'}: {error.message}"
    except (ValueError, RecursionError) as error:  # nested too deeply
        return f"is not a valid JSON Schema: {error}"
    return None


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
