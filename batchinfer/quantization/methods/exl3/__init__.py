"""EXL3 checkpoints of ExLlamaV3, run by the code of `qtip`."""
