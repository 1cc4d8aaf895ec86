"""The one place where anything is tried again: exponential waits with jitter, capped in total time.

Must not know: S3, files. What is worth another try says so by raising RetryableFailure; every other
exception passes through untouched. Invariant: a call ends within `max_elapsed_s` plus the length of
one try, with its result, with the caller's own error, or with TransientError.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import tenacity

from batchinfer.errors import TransientError

T = TypeVar("T")

FIRST_WAIT_S = 0.2
MAX_WAIT_S = 10.0
STOP_POLL_S = 0.1


class RetryableFailure(Exception):
    """One try failed for outside reasons (throttling, timeout, connection lost, 5xx)."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long to retry. `should_stop` turns true when waiting is no longer worth it.

    A request still gets its first try after that, so that a stopping run can flush; it only never
    waits for another one.
    """

    should_stop: Callable[[], bool]
    max_elapsed_s: float

    def call(self, attempt: Callable[[], T], what: str) -> T:
        """The result of `attempt`, or TransientError naming `what` once enough was tried."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(RetryableFailure),
            wait=tenacity.wait_random_exponential(multiplier=FIRST_WAIT_S, max=MAX_WAIT_S),
            stop=tenacity.stop_before_delay(self.max_elapsed_s),
            sleep=self._wait,
            reraise=True,
        )
        started_s = time.monotonic()
        try:
            return retrying(attempt)
        except RetryableFailure as failure:
            tried_s = time.monotonic() - started_s
            num_tries = retrying.statistics["attempt_number"]
            raise TransientError(
                f"{what} failed {num_tries} times in {tried_s:.1f} s, last with: {failure}. "
                "Nothing durable is lost: start again when the store answers"
            ) from failure
        except _StopAsked:
            tried_s = time.monotonic() - started_s
            raise TransientError(
                f"{what} failed, and the run was asked to stop {tried_s:.1f} s into trying again. "
                "Nothing durable is lost: start again"
            ) from None

    def _wait(self, wait_s: float) -> None:
        """Sleep that a stop request ends immediately."""
        deadline_s = time.monotonic() + wait_s
        while True:
            if self.should_stop():
                raise _StopAsked
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0:
                return
            time.sleep(min(remaining_s, STOP_POLL_S))


class _StopAsked(Exception):
    """Raised out of a wait, never out of this module."""
