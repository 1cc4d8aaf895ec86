"""A model's tokenizer without transformers, whose import takes seconds.

Put in the place of `batchinfer.prompt.encode._load` by those who measure or test all but that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar


class LightTokenizer:
    """As much of a fast tokenizer as rendering and decoding ask for; `path`: a model folder."""

    is_fast = True
    split_special_tokens = False
    special_tokens_map: ClassVar[dict[str, str]] = {}

    def __init__(self, path: str) -> None:
        from tokenizers import Tokenizer

        self.name_or_path = path
        self.backend_tokenizer = Tokenizer.from_file(f"{path}/tokenizer.json")

    def get_chat_template(self, template: str | None, tools: Any = None) -> str:
        """The text of a template, or the folder's own."""
        if template is not None:
            return template
        own = Path(self.name_or_path) / "chat_template.jinja"
        if not own.is_file():
            raise ValueError("the folder has no chat template")
        return own.read_text()
