"""Where the labels of a plot go, so that none covers another, a point or a line.

Each label may sit at some places around its point. They are weighed by what they would cover, and
the cheapest is taken; then every label chooses again, knowing all others, until none moves. The
same input gives the same places: there is no randomness in it. Must not know: how text is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

#: Nearest first. Beyond the first a leader line connects the label with its point.
_DISTANCES = (6.0, 14.0, 24.0, 36.0, 50.0, 66.0, 84.0, 104.0)
#: Unit vectors, those that read best first: right, above, below, left, then the corners.
_DIRECTIONS = ((1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
_MAX_ROUNDS = 20
_PADDING = 2.0
#: What covering costs, in the units of a distance. A label over a label is never worth it.
_OVER_LABEL, _OVER_POINT, _OUTSIDE, _OVER_LINE, _OVER_LEADER = 1e6, 1e5, 1e7, 90.0, 400.0


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle; x to the right, y upwards, in pixels or points."""

    left: float
    bottom: float
    right: float
    top: float

    def grown(self, by: float) -> Box:
        return Box(self.left - by, self.bottom - by, self.right + by, self.top + by)

    def overlaps(self, other: Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.bottom < other.top
            and other.bottom < self.top
        )

    def has(self, x: float, y: float) -> bool:
        return self.left < x < self.right and self.bottom < y < self.top

    def holds(self, other: Box) -> bool:
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.bottom <= other.bottom
            and other.top <= self.top
        )


@dataclass(frozen=True, slots=True)
class Label:
    """A text's anchor point, and its width and height."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Place:
    """The box of a label. `has_leader`: it is so far from its point that a line has to lead."""

    box: Box
    has_leader: bool


Segment = tuple[tuple[float, float], tuple[float, float]]


def place_labels(
    labels: Sequence[Label],
    frame: Box,
    *,
    lines: Sequence[Segment] = (),
    marker_radius: float = 5.0,
) -> list[Place]:
    """A place for each label. `frame`: what all have to stay in; `lines`: what is drawn between."""
    places: dict[int, Place] = {}
    markers = [_square(label.x, label.y, marker_radius) for label in labels]
    # The most crowded choose first: the others have room anyway.
    order = sorted(range(len(labels)), key=lambda i: (-_crowd(labels, i), i))
    for _ in range(_MAX_ROUNDS):
        before = dict(places)
        for index in order:
            others = [place for other, place in places.items() if other != index]
            leaders = [
                leader
                for other, place in places.items()
                if other != index and (leader := leader_of(labels[other], place)) is not None
            ]
            surroundings = _Surroundings(frame, others, markers, leaders, lines)
            places[index] = _cheapest(labels[index], surroundings)
        if places == before:
            break
    return [places[index] for index in range(len(labels))]


def leader_of(label: Label, place: Place) -> Segment | None:
    """From the label's point to the nearest place of its box, where that is far."""
    if not place.has_leader:
        return None
    box = place.box
    x = min(max(label.x, box.left), box.right)
    y = min(max(label.y, box.bottom), box.top)
    return (label.x, label.y), (x, y)


@dataclass(frozen=True, slots=True)
class _Surroundings:
    frame: Box
    others: Sequence[Place]
    markers: Sequence[Box]
    leaders: Sequence[Segment]
    lines: Sequence[Segment]

    def cost(self, label: Label, candidate: tuple[float, Place]) -> float:
        effort, place = candidate
        box = place.box.grown(_PADDING)
        cost = effort
        cost += _OUTSIDE * (not self.frame.holds(place.box))
        cost += _OVER_LABEL * sum(box.overlaps(other.box) for other in self.others)
        cost += _OVER_POINT * sum(place.box.overlaps(marker) for marker in self.markers)
        cost += _OVER_LINE * sum(_crosses(line, box) for line in self.lines)
        cost += _OVER_LEADER * sum(_crosses(leader, box) for leader in self.leaders)
        own = leader_of(label, place)
        if own is not None:
            cost += _OVER_LEADER * sum(_crosses(own, other.box) for other in self.others)
            foreign = (m for m in self.markers if not m.has(label.x, label.y))
            cost += _OVER_LEADER * sum(_crosses(own, marker) for marker in foreign)
            cost += _OVER_LEADER * sum(_intersect(own, leader) for leader in self.leaders)
        return cost


def _cheapest(label: Label, surroundings: _Surroundings) -> Place:
    best, least = None, math.inf
    for effort, place in _candidates(label):  # in order of effort, which covering only adds to
        if effort >= least:
            break
        cost = surroundings.cost(label, (effort, place))
        if cost < least:
            best, least = place, cost
    assert best is not None
    return best


def _candidates(label: Label) -> Iterator[tuple[float, Place]]:
    """(effort, place): all places that a label may take, the least effort first."""
    for ring, distance in enumerate(_DISTANCES):
        for rank, (x, y) in enumerate(_DIRECTIONS):
            scale = distance / math.hypot(x, y)
            left = label.x + x * scale - label.width * (1 - x) / 2
            bottom = label.y + y * scale - label.height * (1 - y) / 2
            box = Box(left, bottom, left + label.width, bottom + label.height)
            yield distance * 2 + rank, Place(box, has_leader=ring > 0)


def _crowd(labels: Sequence[Label], index: int) -> int:
    """How many labels there are nearby."""
    own = labels[index]
    return sum(
        abs(other.x - own.x) < own.width + other.width
        and abs(other.y - own.y) < 2 * (own.height + other.height)
        for other in labels
    )


def _square(x: float, y: float, radius: float) -> Box:
    return Box(x - radius, y - radius, x + radius, y + radius)


def _crosses(line: Segment, box: Box) -> bool:
    """Whether a segment has a point inside a box (Liang and Barsky's clipping)."""
    (x0, y0), (x1, y1) = line
    enter, leave = 0.0, 1.0
    for start, delta, low, high in (
        (x0, x1 - x0, box.left, box.right),
        (y0, y1 - y0, box.bottom, box.top),
    ):
        if delta == 0:
            if not low < start < high:
                return False
            continue
        near, far = sorted(((low - start) / delta, (high - start) / delta))
        enter, leave = max(enter, near), min(leave, far)
    return enter < leave


def _intersect(one: Segment, other: Segment) -> bool:
    return (
        _side(one, other[0]) * _side(one, other[1]) < 0
        and _side(other, one[0]) * _side(other, one[1]) < 0
    )


def _side(line: Segment, point: tuple[float, float]) -> float:
    (x0, y0), (x1, y1) = line
    return (x1 - x0) * (point[1] - y0) - (y1 - y0) * (point[0] - x0)
