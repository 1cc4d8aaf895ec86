"""bitsandbytes: NF4 while a model is loaded; NF4, FP4 and 8-bit checkpoints."""
