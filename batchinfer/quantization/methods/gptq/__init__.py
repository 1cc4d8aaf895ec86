"""Checkpoints in GPTQ's own format."""
