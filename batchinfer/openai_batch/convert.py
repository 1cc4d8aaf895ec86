"""The lines of a batch -> one Parquet file: a row for each choice of an answer, with its prompt's
tokens and its sampling; a row for each line that cannot be asked, with the reason.

The file appears once it is whole, and says in its footer what it was made from. Must not know:
engines, answers. Memory: some lines at a time, and 16 bytes for each custom_id.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby, islice
from operator import itemgetter
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from batchinfer.config import PromptSettings, SamplingSettings
from batchinfer.config.problems import translate
from batchinfer.errors import ConfigError
from batchinfer.model import ModelFacts
from batchinfer.openai_batch.bodies import COMPLETION_TOKENS, Asked, asked_of
from batchinfer.openai_batch.lines import Line, LineError, Refusal
from batchinfer.prompt import Prompter, PromptLimit
from batchinfer.prompt.load_encoder import load_encoder
from batchinfer.storage import Store

FACTS_KEY = b"batchinfer.requests"
#: Of the file: what the job filters by, and what it keeps.
FILTER = "refusal IS NULL"
KEPT = ("line", "custom_id", "prompt", "choice", "url", "model", "returns_token_ids")

_OWN_TYPES: Mapping[str, pa.DataType] = {
    "max_tokens": pa.int64(),
    "temperature": pa.float64(),
    "top_p": pa.float64(),
    "top_k": pa.int64(),
    "min_p": pa.float64(),
    "presence_penalty": pa.float64(),
    "frequency_penalty": pa.float64(),
    "repetition_penalty": pa.float64(),
    "stop": pa.list_(pa.string()),
    "stop_token_ids": pa.list_(pa.int64()),
    "seed": pa.int64(),
    "logprobs": pa.int64(),
    "ignore_eos": pa.bool_(),
    "json_schema": pa.string(),
    "regex": pa.string(),
    "choice": pa.list_(pa.string()),
    "grammar": pa.string(),
    "lora": pa.string(),
}
SCHEMA = pa.schema(
    {
        "line": pa.int64(),
        "prompt": pa.int32(),
        "choice": pa.int32(),
        "custom_id": pa.string(),
        "url": pa.string(),
        "model": pa.string(),
        "returns_token_ids": pa.bool_(),
        "token_ids": pa.list_(pa.int32()),
        **{f"own_{name}": kind for name, kind in _OWN_TYPES.items()},
        "refusal": pa.string(),
    }
)
_BATCH_LINES = 512
_UNSTORABLE = (pa.ArrowException, ArithmeticError, TypeError, ValueError)


def own_columns(names: Collection[str]) -> dict[str, str]:
    """`sampling.per_row` for settings that lines have."""
    return {name: f"own_{name}" for name in _OWN_TYPES if name in names}


@dataclass(slots=True)
class Converted:
    """What was found in the lines."""

    settings: list[str] = field(default_factory=list)  # that lines have of their own
    returns_token_ids: bool = False
    num_lines: int = 0
    num_refused: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """What a file of requests is made from; `made_of` tells two apart."""

    made_of: Mapping[str, Any]
    models: Collection[str]
    adapters: Collection[str]
    sampling: SamplingSettings
    max_tokens: int | None  # where a line does not say it; None: OpenAI's
    chat_template: str | None


def convert(
    lines: Iterator[Line],
    source: Source,
    model: ModelFacts,
    publish: tuple[Store, str],
) -> Converted:
    """Write the file. Raises ConfigError for a chat template that the model does not have."""
    prompts = _Prompts(model, source.chat_template)
    found, settings = Converted(), set[str]()

    def write(sink: BinaryIO) -> None:
        with pq.ParquetWriter(sink, SCHEMA, compression="zstd") as writer:
            while some := list(islice(lines, _BATCH_LINES)):
                rows = list(_rows(some, source, model, prompts))
                try:
                    table = pa.Table.from_pylist(rows, SCHEMA)
                except _UNSTORABLE:
                    rows = list(_storable(rows))
                    table = pa.Table.from_pylist(rows, SCHEMA)
                found.num_lines += len(some)
                found.num_refused += sum(row["refusal"] is not None for row in rows)
                found.returns_token_ids |= any(row.get("returns_token_ids") for row in rows)
                for row in rows:
                    settings.update(n for n in _OWN_TYPES if row.get(f"own_{n}") is not None)
                writer.write_table(table)
            found.settings = [name for name in _OWN_TYPES if name in settings]
            facts = {"made_of": source.made_of, "found": asdict(found)}
            writer.add_key_value_metadata({FACTS_KEY: json.dumps(facts)})

    store, key = publish
    store.publish(key, write)
    return found


def read_converted(store: Store, key: str) -> tuple[Mapping[str, Any], Converted] | None:
    """What a file of requests was made of, and what was found; None if there is none."""
    if store.stat(key) is None:
        return None
    try:
        with store.open(key) as file:
            metadata = pq.read_metadata(file).metadata or {}
        facts = json.loads(metadata[FACTS_KEY])
        return facts["made_of"], Converted(**facts["found"])
    except (pa.ArrowException, KeyError, ValueError, TypeError):
        raise ConfigError(
            f"{store.url_of(key)} is not a file of requests that this version has written: "
            "delete its folder, or choose another -o"
        ) from None


def _rows(
    lines: Sequence[Line], source: Source, model: ModelFacts, prompts: _Prompts
) -> Iterator[dict[str, Any]]:
    """In the order of lines and choices."""
    taken: list[tuple[Line, Asked | Refusal]] = []
    for line in lines:
        if line.refusal is not None:
            taken.append((line, line.refusal))
            continue
        try:
            asked = asked_of(line, source.sampling, source.models, source.adapters)
            _check_tokens(asked, model.vocab_size)
            taken.append((line, asked))
        except LineError as error:
            taken.append((line, error.refusal))
    tokens = prompts.tokens([found for _, found in taken if isinstance(found, Asked)])
    for line, found in taken:
        if isinstance(found, Refusal):
            yield _refused(line, found)
            continue
        of_line = next(tokens)
        wrong = next((one for one in of_line if isinstance(one, Refusal)), None)
        if wrong is not None:
            yield _refused(line, wrong)
            continue
        for number, ids in enumerate(of_line):
            yield from _choices(line, found, source, model, (number, ids))


def _check_tokens(asked: Asked, vocab_size: int) -> None:
    """Raise LineError for a token that would never come."""
    if beyond := [i for i in asked.own.get("stop_token_ids", ()) if i >= vocab_size]:
        raise LineError(
            f"stop_token_ids: {beyond[0]} is not a token of the model, whose vocabulary has "
            f"{vocab_size:,}",
            "invalid_value",
            "stop_token_ids",
        )


def _storable(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows, those of a line with a value that no column takes as its refusal."""
    for _, of_line in groupby(rows, key=itemgetter("line")):
        some = list(of_line)
        try:
            pa.Table.from_pylist(some, SCHEMA)
        except _UNSTORABLE as error:
            first = some[0]
            refusal = Refusal(f"the body has a value that cannot be: {error}", "invalid_value")
            some = [_refused(Line(first["line"], first["custom_id"], "", {}), refusal)]
        yield from some


def _choices(
    line: Line,
    asked: Asked,
    source: Source,
    model: ModelFacts,
    prompt: tuple[int, Any],
) -> Iterator[dict[str, Any]]:
    number, ids = prompt
    own = dict(asked.own)
    room = model.max_model_len - len(ids)
    most = source.max_tokens or (room if asked.is_chat else COMPLETION_TOKENS)
    own["max_tokens"] = min(own.get("max_tokens", most), room)
    if isinstance(own.get("stop"), str):
        own["stop"] = [own["stop"]]
    for index in range(asked.num_choices):
        if index and "seed" in own:
            own["seed"] = (own["seed"] + 1) & (2**63 - 1)
        yield {
            "line": line.number,
            "prompt": number,
            "choice": number * asked.num_choices + index,
            "custom_id": line.custom_id,
            "url": line.url,
            "model": asked.model,
            "returns_token_ids": asked.returns_token_ids,
            "token_ids": ids,
            **{f"own_{name}": value for name, value in own.items()},
            "refusal": None,
        }


def _refused(line: Line, refusal: Refusal) -> dict[str, Any]:
    return {
        "line": line.number,
        "prompt": 0,
        "choice": 0,
        "custom_id": line.custom_id,
        "refusal": json.dumps(asdict(refusal)),
    }


class _Prompts:
    """Prompts of all kinds -> token ids, by the prompters of jobs."""

    def __init__(self, model: ModelFacts, chat_template: str | None) -> None:
        self._model = model
        self._chat_template = chat_template
        self._encoder = load_encoder(model.tokenizer_path, trust_remote_code=False)
        self._prompters: dict[str, Prompter] = {}
        self._plain = self._kind(Asked([], True, None, {}))  # a conversation that says no more
        if chat_template is not None:
            self._check_template()

    def _check_template(self) -> None:
        """Raise ConfigError for what would make every conversation wrong."""
        try:
            self._prompter(self._plain)
        except ValidationError as error:
            key, problem = next(translate(error, PromptSettings))
            raise ConfigError(f"--chat-template: {key}: {problem}") from None

    def tokens(self, asked: Sequence[Asked]) -> Iterator[list[Any]]:
        """For each of them the token ids of each prompt, or a Refusal."""
        groups: dict[str, list[tuple[int, int, str | list[int]]]] = {}
        found: list[list[Any]] = [[None] * len(one.prompts) for one in asked]
        for index, one in enumerate(asked):
            if (unread := self._unread(one)) is not None:
                found[index] = [unread] * len(one.prompts)
                continue
            kind = self._kind(one)
            for number, prompt in enumerate(one.prompts):
                key = kind if isinstance(prompt, str) else "ids"
                groups.setdefault(key, []).append((index, number, prompt))
        for key, places in groups.items():
            values = [prompt for _, _, prompt in places]
            for (index, number, _), ids in zip(places, self._of(key, values), strict=True):
                found[index][number] = ids
        return iter(found)

    def _unread(self, asked: Asked) -> Refusal | None:
        """Why a key of the body, which the chat template is to honour, would be passed over."""
        for key, names in asked.needs_read.items():
            if self._words().isdisjoint(names):
                return Refusal(
                    f"{key} has no effect: the chat template does not read it",
                    "unsupported_parameter",
                    key,
                )
        return None

    def _words(self) -> frozenset[str]:
        """Of the chat template. Raises ConfigError if there is none."""
        self._check_template()
        return self._prompter(self._plain).template_words

    def _kind(self, asked: Asked) -> str:
        """The settings of its prompter, as text."""
        if not asked.is_chat:
            return json.dumps({"column": "prompt"})
        settings: dict[str, Any] = {"messages_column": "prompt"}
        if self._chat_template is not None:
            settings["chat_template"] = self._chat_template
        read = {n: v for n, v in asked.key_kwargs.items() if n in self._words()}
        if kwargs := {**asked.template_kwargs, **read}:
            settings["chat_template_kwargs"] = kwargs
        if asked.continues:
            settings["continue_final_message"] = True
        return json.dumps(settings, sort_keys=True)

    def _of(self, key: str, values: list[Any]) -> Iterator[Any]:
        kind = pa.list_(pa.int64()) if key == "ids" else pa.string()
        try:
            prompter = self._prompter(key)
        except (ConfigError, ValueError) as error:  # of kwargs that a line has
            if "messages_column" in key:
                self._check_template()
            refusal = Refusal(str(error), "invalid_value", "chat_template_kwargs")
            yield from [refusal] * len(values)
            return
        prepared = prompter.prepare(pa.table({"prompt": pa.array(values, kind)}))
        for index in range(len(values)):
            if (wrong := prepared.errors.get(index)) is not None:
                code = "context_length_exceeded" if wrong.kind == "prompt_too_long" else wrong.kind
                param = "messages" if "messages_column" in key else "prompt"
                yield Refusal(wrong.message, code, param)
            else:
                low, high = prepared.offsets[index : index + 2]
                yield np.asarray(prepared.token_ids[low:high])

    def _prompter(self, key: str) -> Prompter:
        if key not in self._prompters:
            settings = {"token_ids_column": "prompt"} if key == "ids" else json.loads(key)
            self._prompters[key] = Prompter(
                PromptSettings.model_validate(settings),
                self._encoder,
                limit=PromptLimit.of_generation(
                    max_model_len=self._model.max_model_len, max_tokens=1
                ),
                vocab_size=self._model.vocab_size,
            )
        return self._prompters[key]
