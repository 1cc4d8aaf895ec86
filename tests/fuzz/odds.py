"""Chances that hold: hypothesis draws the ends of a range far more often than its middle."""

from __future__ import annotations

from hypothesis import strategies as st


def rarely(draw: st.DrawFn, one_in: int) -> bool:
    return draw(st.integers(0, one_in - 1)) == one_in // 2 + 1
