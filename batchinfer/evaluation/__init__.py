"""What a model or a quantization is worth: figures read from finished outputs.

Nothing here drives an engine. What is not computed yet is a job, and runs as `batchinfer run` would
run it, so resume, exactly once and every engine setting hold for an evaluation.
"""

from batchinfer.evaluation.record import PerplexityRequest, Record

__all__ = ["PerplexityRequest", "Record"]
