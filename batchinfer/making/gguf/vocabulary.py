"""A model's tokenizer.json as the metadata of a GGUF file.

llama.cpp splits texts into words by rules of its own, each of which has a name: a tokenizer whose
rule is not known here is refused, as another rule would make other tokens without a word. Must not
know: weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchinfer.errors import ConfigError
from batchinfer.model.folder import read_json, read_optional_json

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: The regular expression that splits a text -> llama.cpp's name for the rule.
_RULES = {_LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2", _TEKKEN: "tekken"}


@dataclass(slots=True)
class VocabularyEntries:
    """What a GGUF file says of its tokenizer. `scores` only of SentencePiece's kind."""

    model: str
    pre: str
    tokens: list[bytes]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] | None = None
    adds_bos: bool = False
    adds_eos: bool = False
    adds_space_prefix: bool | None = None
    chat_templates: dict[str, str] = field(default_factory=dict)  # by name; `default` is the own
    ids: dict[str, int] = field(default_factory=dict)  # bos, eos, padding, ... -> token id


def read_vocabulary(folder: Path, num_tokens: int) -> VocabularyEntries:
    """`num_tokens`: rows of the embedding; ids without a token are filled up to it.

    Raises ConfigError for a tokenizer that is not converted.
    """
    file = folder / "tokenizer.json"
    content = read_json(file, "GGUF files are made with the tokenizer that it describes")
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        raise ConfigError(f"{file}: a tokenizer of type {model.get('type')} is not converted here")
    of_bytes = _is_byte_level(content)
    if not of_bytes and not model.get("byte_fallback"):
        raise ConfigError(f"{file}: it spells bytes neither as GPT-2 nor as Llama 2 does")
    settings = read_optional_json(folder / "tokenizer_config.json")
    found = VocabularyEntries("gpt2" if of_bytes else "llama", "default", [], [])
    _fill_tokens(found, content, num_tokens, file)
    if of_bytes:
        found.pre = _rule(content.get("pre_tokenizer"), file)
        found.merges = [_merge(pair) for pair in model.get("merges") or []]
        if content.get("normalizer") not in (None, {"type": "NFC"}):
            raise ConfigError(f"{file}: llama.cpp does not have its normalizer")
    else:
        found.scores = _scores(found.tokens, model)
        found.adds_space_prefix = "▁" in json.dumps(
            [content.get("normalizer"), content.get("pre_tokenizer")], ensure_ascii=False
        )
    _set_ends(found, content, settings, folder)
    found.chat_templates = _chat_templates(folder, settings)
    return found


def _is_byte_level(content: Mapping[str, Any]) -> bool:
    decoder = content.get("decoder") or {}
    kinds = [decoder, *(decoder.get("decoders") or [])]
    return any(kind.get("type") == "ByteLevel" for kind in kinds)


def _rule(pre_tokenizer: Any, file: Path) -> str:
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and steps[0].get("behavior") == "Isolated":
        rule = _RULES.get((steps[0].get("pattern") or {}).get("Regex", ""))
        if rule is not None and not steps[0].get("invert"):
            return rule
    raise ConfigError(
        f"{file}: its rule for splitting texts is not one of those known here "
        f"({', '.join(['gpt-2', 'smollm', *_RULES.values()])}): take a GGUF file that others made"
    )


def _fill_tokens(
    found: VocabularyEntries, content: Mapping[str, Any], num_tokens: int, file: Path
) -> None:
    by_id: dict[int, tuple[str, int]] = {
        token_id: (token, _NORMAL) for token, token_id in content["model"]["vocab"].items()
    }
    unknown = content["model"].get("unk_token")
    if found.model == "llama":
        for token_id, (token, _) in by_id.items():
            if token.startswith("<0x") and len(token) == 6:
                by_id[token_id] = (token, _BYTE)
    for added in content.get("added_tokens") or []:
        kind = _CONTROL if added.get("special") else _USER_DEFINED
        by_id[added["id"]] = (added["content"], kind)
    for token_id, (token, _) in by_id.items():
        if token == unknown and found.model == "llama":
            by_id[token_id] = (token, _UNKNOWN)
    if max(by_id) >= num_tokens:
        raise ConfigError(
            f"{file} has token ids up to {max(by_id)}, the model's embedding {num_tokens} rows: "
            "they do not belong together"
        )
    for token_id in range(num_tokens):
        token, kind = by_id.get(token_id, (f"[PAD{token_id}]", _UNUSED))
        found.tokens.append(token.encode())
        found.types.append(kind)


def _merge(pair: Any) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)


def _scores(tokens: list[bytes], model: Mapping[str, Any]) -> list[float]:
    """The earlier a merge, the higher: llama.cpp takes the merge whose result scores highest."""
    rank: dict[bytes, int] = {}
    for index, pair in enumerate(model.get("merges") or []):
        rank.setdefault(_merge(pair).replace(" ", "").encode(), index)
    last = len(rank)
    return [float(-rank.get(token, last)) for token in tokens]


def _set_ends(
    found: VocabularyEntries, content: Mapping[str, Any], settings: Mapping[str, Any], folder: Path
) -> None:
    """Special tokens by their roles, and whether texts get one in front or behind."""
    id_of = {token: index for index, token in enumerate(found.tokens)}
    config = read_optional_json(folder / "config.json")
    for role, key in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token")):
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        token_id = id_of.get(str(token).encode()) if token else config.get(f"{key}_id")
        if isinstance(token_id, list):
            token_id = token_id[0] if token_id else None
        if token_id is not None:
            found.ids[role] = int(token_id)
    ends = read_optional_json(folder / "generation_config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    if others := [end for end in ends if end is not None and end != found.ids.get("eos")]:
        found.ids["eot"] = int(others[0])
    before, after = _affixes(content)
    if settings.get("add_bos_token") and found.ids.get("bos") is not None:
        before = True
    found.adds_bos, found.adds_eos = before, after


def _affixes(content: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether the post-processor puts a special token before a text, and behind it."""
    step = content.get("post_processor") or {}
    steps = [step, *(step.get("processors") or [])]
    singles = [s["single"] for s in steps if s.get("type") == "TemplateProcessing"]
    single: list[dict[str, Any]] = singles[0] if singles else []
    is_text = ["Sequence" in entry for entry in single]
    if True not in is_text:
        return False, False
    place = is_text.index(True)
    return place > 0, place < len(is_text) - 1


def _chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """As transformers finds them: in files of their own, else among the tokenizer's settings, else
    where a model that sees has its.
    """
    found = {
        path.stem: path.read_text(encoding="utf-8")
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))
    }
    if (file := folder / "chat_template.jinja").exists():
        found["default"] = file.read_text(encoding="utf-8")
    if found:
        return found
    given = settings.get("chat_template")
    if isinstance(given, list):
        pairs = [(entry.get("name"), entry.get("template")) for entry in given]
        return {n: text for n, text in pairs if isinstance(n, str) and isinstance(text, str)}
    if given is None:
        given = read_optional_json(folder / "chat_template.json").get("chat_template")
    return {"default": given} if isinstance(given, str) else {}
