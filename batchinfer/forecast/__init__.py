"""What a run will take: rows sampled, some of them timed, the rest simulated.

Must not know: click, terminals.
"""
