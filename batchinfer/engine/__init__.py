"""Engines: `base` is the contract, `demands/` what a task may ask, `kinds` finds one by name.

Each engine has a folder: `vllm/`, `llama_cpp/`.
"""
