"""What vLLM's steps are made of, read off the objects of a loaded engine.

Must not know: requests, what is done with it.
"""

from __future__ import annotations

from typing import Any


class ComputedTokens:
    """Counts the tokens that a scheduler hands out to steps; None: it is in another process, and
    nothing is counted.
    """

    def __init__(self, scheduler: Any | None) -> None:
        self.num_tokens = 0
        if scheduler is None:
            return
        schedule = scheduler.schedule

        def counted(*arguments: Any, **named: Any) -> Any:
            output = schedule(*arguments, **named)
            self.num_tokens += output.total_num_scheduled_tokens
            return output

        scheduler.schedule = counted


def graph_width(config: Any) -> int | None:
    """Most tokens of a step that a CUDA graph was captured for; None: there are none."""
    compilation = config.compilation_config
    if config.model_config.enforce_eager or not getattr(compilation, "cudagraph_capture_sizes", ()):
        return None
    return getattr(compilation, "max_cudagraph_capture_size", None)
