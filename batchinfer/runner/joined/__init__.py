"""Runs that share an output by leases in its store: `run JOB --join`."""
