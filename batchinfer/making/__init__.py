"""Quantized checkpoints, made of unquantized models: on request, or once for a job that needs one.

`round_to_nearest` writes one of itself, a tensor at a time; `llm_compressor` has one calibrated by
a process in an environment of its own; `cached` finds one that a job needs, or makes it. What any
of them makes is a folder like others: config.json, tokenizer, safetensors, in compressed-tensors'
formats. Only here and in the engine is torch imported. Must not know: jobs, prompts, engines.
"""
