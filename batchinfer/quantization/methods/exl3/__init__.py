"""EXL3 of ExLlamaV3: recognised, and refused by name."""
