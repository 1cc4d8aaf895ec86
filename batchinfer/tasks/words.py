"""What tasks whose results are logprobs of tokens say of a row of their output, for people.

Must not know: any task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def logprob_words(row: Mapping[str, Any]) -> list[str]:
    """What the tokens of a row have together; nothing where none has one."""
    logprob = row["cumulative_logprob"]
    return [] if logprob is None else [f"logprob {logprob:.2f}"]
