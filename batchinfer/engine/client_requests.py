"""What a client's request does not say, from the job. Must not know: HTTP, engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def completed(
    body: Mapping[str, Any], values: Mapping[str, Any], said_by: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """A request's body with `values` for what it does not say; null says nothing.

    `said_by`: for a key of `values` all keys by which a request says it; else it is its own name.
    """
    missing = {
        name: value
        for name, value in values.items()
        if all(body.get(key) is None for key in said_by.get(name, (name,)))
    }
    return {**body, **missing}
