"""What one row is sampled by, once its columns are read. Must not know: columns."""

from __future__ import annotations

from dataclasses import dataclass

from batchinfer.config.sampling import SamplingSettings


@dataclass(frozen=True, slots=True)
class OwnSampling:
    """How one row is sampled, with what its columns say. `sampling` is the same object for rows
    that are sampled alike.
    """

    sampling: SamplingSettings  # without `per_row`
    seed: int | None = None  # the row's; None: what follows from `sampling.seed`
    lora: str | None = None  # one of `model.adapters`; None: `model.lora`, if there is one

    @property
    def shared(self) -> SamplingSettings:
        """See `OwnWay`, as of all here."""
        return self.sampling

    @property
    def is_repeatable(self) -> bool:
        return self.sampling.is_greedy

    @property
    def max_tokens(self) -> int:
        return self.sampling.max_tokens
