"""The engine vLLM: all that is about vLLM. The package vllm itself is imported only by the modules
that run it, never by this one.
"""
