"""8-bit floats: checkpoints of several families, or quantized while they are loaded."""
