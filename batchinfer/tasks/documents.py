"""Completions as JSON documents: which are whole, and fit the schema that they were asked for.

Engines constrain tokens by a grammar that leaves some keywords of a schema out, so what they made
is looked at. Must not know: engines, rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class Documents:
    """Of `schema`, JSON Schema in the version that its `$schema` names, else 2020-12.

    What cannot be decided fits: by a pattern that is not a regular expression of Rust's, say. Those
    take linear time, or end; Python's may take hours, and no signal ends them.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        import jsonschema_rs

        self._validator: jsonschema_rs.Validator | None = None
        try:
            self._validator = jsonschema_rs.validator_for(dict(schema))
        except (ValueError, RecursionError):  # ValidationError is a ValueError
            return

    def fitting(self, text: str | None, *, is_cut: bool = False) -> str | None:
        """`text` if it is a document that fits. One that is cut and ends in a digit is a number
        that may not be whole.
        """
        if text is None:
            return None
        try:
            document = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return None
        if is_cut and text[-1].isdigit():
            return None
        if self._validator is None:
            return text
        try:
            return text if self._validator.is_valid(document) else None
        except (ValueError, RecursionError):  # too deep for it
            return text


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")  # Python's reader takes NaN and Infinity
