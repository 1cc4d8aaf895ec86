"""A stand-in for engines: for tests and benchmarks, and no job can name it until it is registered.

Must not be imported by the program.
"""

from batchinfer.testing.engine import FakeEngine, FakePlan
from batchinfer.testing.kind import FakeKind, fake_kind, register
from batchinfer.testing.tokenizer import LightTokenizer

__all__ = ["FakeEngine", "FakeKind", "FakePlan", "LightTokenizer", "fake_kind", "register"]
