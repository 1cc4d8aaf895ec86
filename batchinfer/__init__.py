"""Offline batch inference on vLLM: Parquet in, Parquet out, durable and resumable.

The public surface is the command line and the job file; this package exports only its version.
"""

__version__ = "0.1.0"
