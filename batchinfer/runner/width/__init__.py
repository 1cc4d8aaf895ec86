"""`engine.tune`: how many sequences run at once, found on the job's own rows, and remembered."""
