"""Scores of a finished output: its completions against a reference column, or its own perplexity.

Must not know: how it was computed, terminals. A failed row counts as wrong, so that an output does
not get better by failing; a row without a reference is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from batchinfer.errors import ConfigError, InputError
from batchinfer.evaluation.figures import bits_per_byte, mean_nll, scored_rows
from batchinfer.evaluation.intervals import ratio_interval, share_interval
from batchinfer.evaluation.outputs import Output, of_task, read_output
from batchinfer.evaluation.record import Frozen

#: Of a text for ROUGE-L: letters and digits in lower case, as Google's rouge-score takes them, but
#: of any script.
_WORDS = re.compile(r"[^\W_]+")


class MeanEstimate(Frozen):
    """A mean over rows, 0 to 1, and its 95 % interval over rows."""

    mean: float
    low: float | None  # None: a mean of one row
    high: float | None


class Grade(Frozen):
    """`rows` are those with a reference; `rows_failed` of them are errors, and count 0."""

    output: str
    reference: str
    rows: int
    rows_failed: int
    rows_without_reference: int
    exact_match: MeanEstimate  # the same text, but for white space around it
    rouge_l: MeanEstimate | None = None  # F1 of the longest common subsequence of words


class ScoreGrade(Frozen):
    """Perplexity of a score output over the scored tokens of all rows, none of which may fail."""

    output: str
    rows: int
    tokens: int
    nll: float  # nats a token
    perplexity: float
    perplexity_low: float | None  # 95 % interval over rows; None: one row
    perplexity_high: float | None
    bits_per_byte: float | None


def grade(location: str, reference: str | None, *, rouge: bool = False) -> Grade | ScoreGrade:
    """`reference`: a column of the output (`input.keep_columns`); None for a score output.

    Raises ConfigError, InputError.
    """
    output = read_output(location)
    return of_task(_GRADES, output)(output, reference, rouge_l if rouge else None)


def _of_scores(
    output: Output, reference: str | None, rouge: Callable[[str, str], float] | None
) -> ScoreGrade:
    given = {"--reference": reference is not None, "--rouge": rouge is not None}
    if found := [option for option, is_given in given.items() if is_given]:
        raise ConfigError(
            f"{output.url} is an output of task score and has no completions: leave "
            f"{' and '.join(found)} out"
        )
    totals = scored_rows(output, "num_text_bytes")
    nll = mean_nll(totals, output.url)
    bounds = ratio_interval(totals.nll, totals.num_tokens)
    low, high = (None, None) if bounds is None else (math.exp(bound) for bound in bounds)
    return ScoreGrade(
        output=output.url,
        rows=len(totals.nll),
        tokens=int(totals.num_tokens.sum()),
        nll=nll,
        perplexity=math.exp(nll),
        perplexity_low=low,
        perplexity_high=high,
        bits_per_byte=bits_per_byte(totals),
    )


def _of_texts(
    output: Output, reference: str | None, rouge: Callable[[str, str], float] | None
) -> Grade:
    given = output.job.get("input") or {}
    kept = [*(["id"] if given.get("id_column") else []), *(given.get("keep_columns") or [])]
    if (
        reference is None or reference not in kept
    ):  # `completion` would be graded by itself, as always right
        what = "no reference" if reference is None else f"--reference {reference}"
        raise ConfigError(
            f"{output.url} has completions, and {what}: give --reference COLUMN, the column with "
            "the right ones, of those that the job kept of its input (input.keep_columns): "
            f"{', '.join(kept) or 'none'}"
        )
    near: list[float] = []
    rows_graded = exact = failed = without = 0
    for table in output.tables(["completion", "error_type", reference]):
        if str(table.schema.field(reference).type) not in ("string", "large_string"):
            kind = table.schema.field(reference).type
            raise ConfigError(f"column {reference!r} of {output.url} is {kind}, not text")
        rows = zip(
            table["completion"].to_pylist(),
            table["error_type"].to_pylist(),
            table[reference].to_pylist(),
            strict=True,
        )
        for completion, error_type, wanted in rows:
            if wanted is None:
                without += 1
                continue
            failed += error_type is not None
            given = completion or ""
            rows_graded += 1
            exact += error_type is None and given.strip() == wanted.strip()
            if rouge is not None:
                near.append(rouge(given, wanted) if error_type is None else 0.0)
    if not rows_graded:
        raise InputError(f"no row of {output.url} has a value in column {reference!r}")
    return Grade(
        output=output.url,
        reference=reference,
        rows=rows_graded,
        rows_failed=failed,
        rows_without_reference=without,
        exact_match=_share(exact, rows_graded),
        rouge_l=_mean(near) if near else None,
    )


#: How an output of a task is graded.
_GRADES: Mapping[str, Callable[..., Grade | ScoreGrade]] = {
    "generate": _of_texts,
    "score": _of_scores,
}


def _share(num_hits: int, num_rows: int) -> MeanEstimate:
    low, high = share_interval(num_hits, num_rows)
    return MeanEstimate(mean=num_hits / num_rows, low=low, high=high)


def _mean(values: Sequence[float]) -> MeanEstimate:
    numbers = np.array(values)
    low, high = ratio_interval(numbers, np.ones(len(numbers))) or (None, None)
    return MeanEstimate(mean=math.fsum(values) / len(values), low=low, high=high)


def rouge_l(given: str, wanted: str) -> float:
    """F1 of precision and recall of the longest common subsequence of words (Lin 2004), 0 to 1.

    Two texts without words agree. Raises ConfigError if rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.distance import LCSseq
    except ImportError:
        raise ConfigError(
            "ROUGE-L needs the package rapidfuzz: pip install 'batchinfer[grade]'"
        ) from None
    words = [_WORDS.findall(text.lower()) for text in (given, wanted)]
    num_words = len(words[0]) + len(words[1])
    return 2 * LCSseq.similarity(*words) / num_words if num_words else 1.0
