"""A job file that is written says what it was written from."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from batchinfer.config import written
from batchinfer.config.yaml12 import load_yaml

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "",
        "no",
        "null",
        "1e-3",
        "0o7",
        "12:30",
        "*",
        "- a",
        "a: b",
        "a #b",
        "~",
        "a\nb",
        " a",
        "\x85",
    ]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(TEXTS, VALUES, max_size=4), TEXTS)
def test_what_is_written_reads_as_what_was_given(settings: dict[str, Any], note: str) -> None:
    """Whatever it is, and whatever the comments say."""
    text = written(settings, dict.fromkeys(settings, note))
    assert (load_yaml(text, "x").data or {}) == settings


def test_it_looks_as_people_write_it() -> None:
    settings = {
        "input": {"path": "in/*.parquet", "keep_columns": ["a", "no"]},
        "prompt": {"messages": [{"role": "user", "content": "Hello\n\n{{ x }}"}]},
        "sampling": {"temperature": 0.5, "stop": [], "seed": None},
        "engine": {"options": {}},
    }
    notes = {"input.path": "where " * 30, "sampling.seed": "none"}
    assert written(settings, notes).splitlines() == [
        "input:",
        f"  # {'where ' * 15}where",
        f"  # {'where ' * 13}where",
        "  path: in/*.parquet",
        '  keep_columns: [a, "no"]',
        "prompt:",
        "  messages:",
        "    - role: user",
        r'      content: "Hello\n\n{{ x }}"',
        "sampling:",
        "  temperature: 0.5",
        "  stop: []",
        "  # none",
        "  seed: null",
        "engine:",
        "  options: {}",
    ]
