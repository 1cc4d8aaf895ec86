"""GGUF files of llama.cpp: how they are read, and how they are made."""
