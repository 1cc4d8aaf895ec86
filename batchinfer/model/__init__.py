"""Model folder -> facts: context length, dtype, sizes, a digest of its content. No engine here."""

from batchinfer.model.facts import ModelFacts, read_model

__all__ = ["ModelFacts", "read_model"]
