"""Checkpoints that NVIDIA's ModelOpt writes, of schemes that other methods name."""
