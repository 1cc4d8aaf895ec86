"""A fuzzer of the command line: odd inputs, odd job files, interruptions, on the fake engine.

    python -m tests.fuzz --cases 10000 --seed 1

`arrow`, `tables`, `texts`, `jobs` make cases; `case` is one as a folder; `server` starts commands
in forks of one warm process; `check` runs a case and says which promise is broken, if any. Cases
that broke one are kept in `regressions/`, and `tests/end_to_end/test_fuzz.py` runs them.
"""
