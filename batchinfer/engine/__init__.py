"""Engines: `base` is the contract, `vllm` the only implementation. See docs/architecture.md."""
