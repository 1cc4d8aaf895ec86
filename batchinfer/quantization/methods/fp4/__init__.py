"""4-bit floats: NVFP4 and MXFP4."""
