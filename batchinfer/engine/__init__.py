"""Engines: `base` is the contract, `kinds` finds them by name, `vllm` is the only one so far."""
