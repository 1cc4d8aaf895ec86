"""Checkpoints in compressed-tensors' formats, and how they are made."""
