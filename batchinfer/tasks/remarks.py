"""What is said of generated answers that are no documents of the schema they were asked for.

Must not know: where they are counted.
"""

from __future__ import annotations

from collections.abc import Iterator


def of_answers(num_done: int, num_unparsed: int) -> Iterator[str]:
    """Beside thoughts: how many of the answers were cut is not counted."""
    if num_unparsed:
        yield (
            f"{num_unparsed} of {num_done} answers are no JSON documents that fit "
            "sampling.structured.json_schema: where finish_reason is length, raise "
            "sampling.max_tokens; for the others see the job file's documentation"
        )


def of_documents(num_done: int, num_cut: int, num_unparsed: int) -> Iterator[str]:
    """`num_cut`: by max_tokens, of all; `num_unparsed`: they do not fit."""
    if num_unfinished := min(num_cut, num_unparsed):
        yield (
            f"{num_unfinished} of {num_done} completions are not complete JSON documents "
            "(finish_reason length): raise sampling.max_tokens"
        )
    if num_others := num_unparsed - num_unfinished:
        yield (
            f"{num_others} of {num_done} completions ended by themselves and do not fit "
            "sampling.structured.json_schema: sampling.stop cut them, or the engine's grammar "
            "leaves a keyword of the schema out (see the job file's documentation)"
        )
