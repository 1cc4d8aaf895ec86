"""Labels of a plot: inside it, next to their points, over nothing."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.evaluation.comparison.labels import Box, Label, Place, leader_of, place_labels

FRAME = Box(0, 0, 500, 300)


def overlapping(places: list[Place]) -> int:
    return sum(one.box.overlaps(other.box) for one, other in combinations(places, 2))


def test_a_lone_label_is_beside_its_point() -> None:
    (place,) = place_labels([Label(250, 150, 40, 10)], FRAME)
    assert not place.has_leader
    assert place.box.left > 250
    assert place.box.bottom < 150 < place.box.top


@pytest.mark.parametrize("corner", [(2, 2), (498, 2), (2, 298), (498, 298)])
def test_a_label_in_a_corner_stays_inside(corner: tuple[float, float]) -> None:
    (place,) = place_labels([Label(*corner, 60, 10)], FRAME)
    assert FRAME.holds(place.box)


def test_labels_of_one_spot_go_around_it() -> None:
    """Nine formats of nearly the same size and quality, as four-bit formats are."""
    labels = [Label(250 + i, 150 - i % 3, 45, 10) for i in range(9)]
    places = place_labels(labels, FRAME)
    assert not overlapping(places)
    for label, place in zip(labels, places, strict=True):
        assert not any(place.box.has(other.x, other.y) for other in labels)
        assert place.has_leader == (leader_of(label, place) is not None)


def test_a_label_avoids_the_line_between_points() -> None:
    (place,) = place_labels([Label(100, 150, 40, 10)], FRAME, lines=[((100, 150), (400, 150))])
    assert place.box.bottom >= 150 or place.box.top <= 150 or place.box.right <= 100


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.floats(20, 480), st.floats(20, 280), st.floats(15, 60)),
        min_size=1,
        max_size=14,
    )
)
def test_no_label_covers_another_wherever_the_points_are(
    points: list[tuple[float, float, float]],
) -> None:
    labels = [Label(x, y, width, 9) for x, y, width in points]
    places = place_labels(labels, FRAME)
    assert not overlapping(places)
    assert all(FRAME.holds(place.box) for place in places)
    assert places == place_labels(labels, FRAME)  # no randomness in it
