"""llama.cpp in our process: everything about it as an engine."""
