"""A model's tokenizer without transformers, whose import takes seconds. It knows no chat.

Put in the place of `batchinfer.prompt.encode._load` by those who measure or test all but that.
"""

from __future__ import annotations


class LightTokenizer:
    """As much of a fast tokenizer as rendering and decoding ask for; `path`: a model folder."""

    is_fast = True
    split_special_tokens = False

    def __init__(self, path: str) -> None:
        from tokenizers import Tokenizer

        self.backend_tokenizer = Tokenizer.from_file(f"{path}/tokenizer.json")
