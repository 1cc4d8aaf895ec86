"""Jobs that score texts, for tests on the fake engine."""

from __future__ import annotations

from typing import Any

from tests.support.jobs import Place, job


def score_job(place: Place, output: str = "out", **sections: Any) -> dict[str, Any]:
    """As `job`, with windows so small that the rows of the tests have several."""
    chosen = {"prompt": {"column": "text"}, "score": {"context": 8, "stride": 3}, **sections}
    settings = job(place, output, task="score", **chosen)
    settings.pop("sampling")
    return settings


def job_of_task(task: str, place: Place, output: str = "out") -> dict[str, Any]:
    return score_job(place, output) if task == "score" else job(place, output)
