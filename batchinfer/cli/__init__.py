"""The command line: the only place that prints, and that turns errors into text and exit codes."""

from batchinfer.cli.app import main

__all__ = ["main"]
