"""QTIP's trellis-coded checkpoints, made of unquantized models (arXiv 2406.11235).

`viterbi` finds the walk through the trellis that is nearest to a tile of weights. Must not know:
jobs, engines, where folders are.
"""
