"""The fake's logprobs of prompts: those of its completions."""

from batchinfer.testing.demands.completion import FakeCompletions

ANSWERS = FakeCompletions
