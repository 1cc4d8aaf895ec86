"""GGUF of llama.cpp: recognised, and refused by name."""
