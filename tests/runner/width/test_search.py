"""The search for the width that costs least, on steps whose cost is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from batchinfer.runner.width.search import Found, Stepped, WidthSearch, widths_up_to
from tests.support.simulated_engine import Simulated

Cost = Callable[[int, int], float]


def gets_dearer_above(width: int) -> Cost:
    """A step of more sequences takes longer than two of half as many."""

    def seconds(running: int, prompt_tokens: int) -> float:
        over = max(0, running - width)
        return 0.004 + 1e-4 * running + 4e-5 * prompt_tokens + 3e-4 * over

    return seconds


def like_a_gpu(running: int, prompt_tokens: int) -> float:
    """What a step costs whatever it holds is shared by all that run."""
    return 0.008 + 45e-6 * running + 25e-6 * prompt_tokens


def without_graphs_above_512(running: int, prompt_tokens: int) -> float:
    return like_a_gpu(running, prompt_tokens) + (0.02 if running > 512 else 0.0)


def found_with(engine: Simulated, most: int, **options: Any) -> Found:
    return engine.search(WidthSearch(most, **options)).found()


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.4])
@pytest.mark.parametrize(("knee", "most"), [(64, 256), (200, 1024), (24, 64)])
def test_the_best_width_is_found_where_wider_is_slower(noise: float, knee: int, most: int) -> None:
    for seed in range(3):
        engine = Simulated(gets_dearer_above(knee), noise=noise, seed=seed)
        found = found_with(engine, most)
        best = max(engine.rows_per_s(width) for width in range(8, most + 1, 8))
        assert engine.rows_per_s(found.width) >= 0.9 * best
        assert found.is_decided


@pytest.mark.parametrize("noise", [0.0, 0.4])
@pytest.mark.parametrize("completion_tokens", [32, 128, 512])
def test_the_widest_stays_where_it_is_fastest(noise: float, completion_tokens: int) -> None:
    engine = Simulated(like_a_gpu, completion_tokens=completion_tokens, noise=noise)
    found = found_with(engine, 1024)
    assert (found.width, found.gain, found.is_decided) == (1024, 0.0, True)
    assert found.seconds < 30, "it is over once nothing looks better, without draining the engine"


def test_a_width_that_graphs_cover_is_tried_and_found() -> None:
    engine = Simulated(without_graphs_above_512)
    found = found_with(engine, 1024, graph_width=512)
    assert found.width == 512
    really = engine.rows_per_s(512) / engine.rows_per_s(1024)
    assert found.gain == pytest.approx(really - 1, abs=0.04)


@pytest.mark.parametrize("prompt_tokens", [8, 1000])
def test_many_prompts_after_a_widening_do_not_make_it_look_slow(prompt_tokens: int) -> None:
    """Those of the rows that join are computed while it is measured; steady rows bring few."""
    engine = Simulated(like_a_gpu, prompt_tokens=prompt_tokens, completion_tokens=200)
    found = found_with(engine, 512)
    for width, speed in found.speeds.items():
        really = engine.rows_per_s(width) / engine.rows_per_s(512)
        assert speed == pytest.approx(really, rel=0.25)


def test_a_difference_of_less_than_three_percent_changes_nothing() -> None:
    def nearly_alike(running: int, prompt_tokens: int) -> float:
        return 2e-4 * running * (1.02 if running > 100 else 1.0) + 4e-5 * prompt_tokens

    assert found_with(Simulated(nearly_alike, noise=0.05), 256).width == 256


def test_a_machine_that_becomes_slower_meanwhile_makes_nothing_look_better() -> None:
    """Narrow widths come first, when it was faster; in their second turn they are not."""
    steps = 0

    def slower_and_slower(running: int, prompt_tokens: int) -> float:
        nonlocal steps
        steps += 1
        busy = 1.0 if steps < 150 else 1.5
        return busy * (2e-4 * running + 4e-5 * prompt_tokens + 1e-3)

    assert found_with(Simulated(slower_and_slower, completion_tokens=20), 256).width == 256


def test_no_width_is_tried_that_the_engine_has_no_room_for() -> None:
    engine = Simulated(like_a_gpu, room=300)
    found = found_with(engine, 1024)
    assert (found.width, found.has_room) == (1024, False)
    assert max(found.speeds) == 512


def test_rows_that_end_end_the_search_and_the_widest_stays() -> None:
    found = found_with(Simulated(gets_dearer_above(64), num_rows=300), 256)
    assert (found.width, found.is_decided, found.has_widest) == (256, False, False)


def test_the_time_is_kept_to_whatever_a_step_takes() -> None:
    search = WidthSearch(256)
    while not search.is_over:
        search.add(Stepped(search.width + 10, search.width, search.width, 2.5))
    assert search.found().seconds <= 62.5


@pytest.mark.parametrize(
    ("most", "graph_width", "widths"),
    [
        (1024, None, [64, 128, 256, 512, 1024]),
        (1000, 992, [56, 120, 248, 496, 992, 1000]),
        (1024, 512, [64, 128, 256, 512, 1024]),
        (256, None, [16, 32, 64, 128, 256]),
        (20, None, [8, 20]),
        (8, None, [8]),
    ],
)
def test_widths_are_halvings_of_the_widest_that_graphs_fit(
    most: int, graph_width: int | None, widths: list[int]
) -> None:
    assert widths_up_to(most, graph_width) == widths
