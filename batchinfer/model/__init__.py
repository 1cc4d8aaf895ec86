"""Model folder -> facts: context length, dtype, sizes, a digest of its content. No engine here."""

from batchinfer.model.facts import ModelFacts, read_model
from batchinfer.model.folder import has_chat_template
from batchinfer.model.lora import Lora
from batchinfer.model.marks import changed_weights, weight_marks
from batchinfer.model.needs import Needs

__all__ = [
    "Lora",
    "ModelFacts",
    "Needs",
    "changed_weights",
    "has_chat_template",
    "read_model",
    "weight_marks",
]
