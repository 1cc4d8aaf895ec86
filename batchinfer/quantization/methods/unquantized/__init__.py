"""Weights that no quantization has touched, and the dtypes they run in."""
