"""GGUF files of llama.cpp, made of an unquantized model's folder.

Must not know: torch, transformers; weights are read as bytes, the tokenizer as the JSON it is.
"""
