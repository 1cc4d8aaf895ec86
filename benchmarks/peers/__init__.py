"""Other ways to do one job, beside `batchinfer run`: throughput to disk, and what a kill -9 costs.

    python -m benchmarks.peers [--rows N] [--repeats N] [--only NAME ...] [--json FILE] [--write]

Every run is a process of its own, in an environment of its own where the peer needs one
(`make bench-peers-setup`; an absent one is left out of the table, and named). The harness starts,
times, kills and reads what is on disk; it computes nothing itself. `work` is the job, `contenders`
the ways to do it, `processes` what is measured from outside, `report` the table; `run_llm`,
`run_batch`, `run_ray` and `run_datatrove` run in the processes.
"""
