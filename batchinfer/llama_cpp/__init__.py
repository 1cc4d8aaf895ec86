"""llama.cpp's own library, as the package xllamacpp ships it: loading it, and a file's vocabulary.

Must not know: jobs, prompts, requests. Importing it is light.
"""
