"""What a run, or a plan of one, is judged by. Must not know: what was run."""

from __future__ import annotations

from batchinfer.engine.base import EngineFacts
from batchinfer.runner.start import Start
from batchinfer.verdict import Measure, Setup, peaks_of, setup_of


def judged_by(start: Start, facts: EngineFacts, measure: Measure | None = None) -> Setup:
    """`measure`: of a device that neither the table nor an earlier run knows."""
    prompts_too = start.task.demand.wants == "prompt_logprobs" or start.job.sampling.prompt_logprobs
    peaks = peaks_of(facts.device, facts.dtype, measure, facts.name)
    return setup_of(facts, start.model, peaks, has_all_logits=prompts_too)
