"""QTIP: trellis-coded weights; the codec, checkpoints, and the method for vLLM."""
