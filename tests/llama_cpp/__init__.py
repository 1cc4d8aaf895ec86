"""llama.cpp's library."""
