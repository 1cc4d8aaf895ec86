"""Checkpoints in AWQ's own format."""
