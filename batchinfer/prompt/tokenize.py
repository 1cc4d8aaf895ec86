"""A table of rows to flat token ids: render, tokenize, cut or refuse what is too long.

Must not know: shards, storage, engines. Invariant: a row either has between 1 and as many token ids
as its limit allows, or an error and none; no row's failure touches another row.
Token data is flat numpy; what the tokenizer returns is dropped batch by batch. Memory: some copies
of 32 MiB of rows, or of one row, whatever the table holds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from batchinfer.config import PromptSettings, thaw
from batchinfer.errors import RowError
from batchinfer.prompt.chat import ChatTemplate
from batchinfer.prompt.drafts import Draft, check_type, make_drafter, needed_columns
from batchinfer.prompt.encode import (
    Int32Array,
    Int64Array,
    TokenEncoder,
    slice_chars_of,
)
from batchinfer.prompt.limit import PromptLimit, RowLimits
from batchinfer.prompt.load_encoder import load_encoder
from batchinfer.prompt.messages import message_values
from batchinfer.prompt.prepared import Prepared, joined
from batchinfer.prompt.remarks import Remark
from batchinfer.prompt.stand_ins import stand_in
from batchinfer.prompt.token_ids import TokenIds, read_token_ids
from batchinfer.prompt.values import column_values, template_values
from batchinfer.source import has_uuids

logger = logging.getLogger("batchinfer.prompt")

#: In `Prepared.counts`: bytes of a row's text in UTF-8, -1 where there is none.
TEXT_BYTES = "num_text_bytes"

# A cut content may get other tokens at its end, so the first cut can be some tokens too long.
_MAX_CUTS = 6
_MAX_TABLE_BYTES = 32 << 20  # of a table whose rows are made prompts of together
# No prompt has this many characters per token: a longer text is too long without tokenizing it.
_MAX_CHARS_PER_TOKEN = 64
_ALLOWED_CHARS = 4 << 20


class Prompter:
    """How rows of one job become prompts. May be used from several threads."""

    def __init__(
        self,
        prompt: PromptSettings,
        tokenizer: str | TokenEncoder,
        *,
        limit: PromptLimit,
        vocab_size: int,
        trust_remote_code: bool = False,
        counts_bytes: bool = False,
        is_continuation: bool = False,
    ) -> None:
        """`tokenizer`: its folder or GGUF file, or one that is loaded. `counts_bytes`: also note
        how long the texts are. `is_continuation`: something is before each text, so no special
        tokens are put around it. Raises ConfigError for whatever would fail in every row.
        """
        self._prompt = prompt
        self.limit = limit
        self._counts_bytes = counts_bytes
        self._vocab_size = vocab_size
        if isinstance(tokenizer, str):
            tokenizer = load_encoder(tokenizer, trust_remote_code=trust_remote_code)
        self._encoder = tokenizer
        self._is_chat = prompt.messages is not None or prompt.messages_column is not None
        # A chat template writes the special tokens itself.
        self._adds_special_tokens = not self._is_chat and not is_continuation
        chat: ChatTemplate | None = None
        if self._is_chat:
            chat = ChatTemplate(
                tokenizer.tokenizer,
                prompt.chat_template,
                thaw(prompt.chat_template_kwargs),
                continues=prompt.continue_final_message,
            )
        elif (
            prompt.token_ids_column is None
            and not is_continuation
            and (ending := tokenizer.appended_text)
        ):
            logger.warning(
                "the tokenizer ends each prompt with %s, as its own settings say: a model that was "
                "not trained that way answers as if the text were finished",
                ending,
            )
        #: That the chat template may read; none where there is none.
        self.template_words = frozenset[str]() if chat is None else chat.words
        self._draft = None if prompt.token_ids_column else make_drafter(prompt, chat)
        self.columns: tuple[str, ...] = tuple(needed_columns(prompt))

    @property
    def encoder(self) -> TokenEncoder:
        """The tokenizer, for another prompter of the same model."""
        return self._encoder

    def prepare(self, table: pa.Table, limits: RowLimits | None = None) -> Prepared:
        """Prompts of all rows. Raises InputError if a column has a type that no row could use.

        `limits`: each row's own [num_rows], or why there is none and the row is an error.
        """
        check_type(self._prompt, table.schema)
        if self._prompt.token_ids_column is not None:
            return self._prepare_token_ids(table.column(self._prompt.token_ids_column), limits)
        num_parts = 1 + table.select(self.columns).nbytes // _MAX_TABLE_BYTES
        if num_parts == 1:
            return self._prepare_texts(table, limits)
        step = max(1, table.num_rows // num_parts)
        starts = range(0, table.num_rows, step)
        parts = [
            self._prepare_texts(table.slice(start, step), limits and limits[start : start + step])
            for start in starts
        ]
        return joined(parts, step)

    def _prepare_texts(self, table: pa.Table, limits: RowLimits | None) -> Prepared:
        errors: dict[int, RowError] = {}
        drafts: dict[int, Draft] = {}
        remarks: dict[Remark, list[int]] = {}
        num_cut = 0
        most: dict[int, PromptLimit] = {}
        for index, row in enumerate(self._rows(table)):
            try:
                limit = self.limit if limits is None else limits[index]
                if isinstance(limit, RowError):
                    raise limit
                most[index] = limit
                drafts[index] = draft = self._checked_draft(row, limit)
                for remark in draft.remarks:
                    remarks.setdefault(remark, []).append(index)
            except RowError as error:
                errors[index] = _without_traceback(error)
        tokens = self._encode(drafts)
        too_long = [i for i, ids in tokens.items() if len(ids) > most[i].max_tokens]
        if self._prompt.on_too_long != "error":
            cuttable = {i: drafts[i] for i in too_long if drafts[i].content is not None}
            fitting, failed = self._cut_to_fit(cuttable, tokens, most)
            tokens |= fitting
            num_cut = len(fitting)
            errors |= failed
            too_long = [i for i in too_long if i not in cuttable]
        errors |= {i: most[i].too_long(len(tokens[i])) for i in too_long}
        empty = np.empty(0, dtype=np.int32)
        per_row = [
            tokens[i] if i in tokens and i not in errors else empty for i in range(table.num_rows)
        ]
        for i, ids in enumerate(per_row):
            if len(ids) == 0 and i not in errors:
                errors[i] = RowError("empty_prompt", "the prompt has no tokens")
        lengths = np.fromiter(map(len, per_row), np.int64, len(per_row))
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        token_ids = np.concatenate([empty, *per_row])
        counts = {}
        if self._counts_bytes:
            counts[TEXT_BYTES] = num_bytes = np.full(table.num_rows, -1, np.int64)
            for index, draft in drafts.items():
                text = draft.text
                num_bytes[index] = len(text) if text.isascii() else len(text.encode())
        return Prepared(
            token_ids,
            offsets,
            dict(sorted(errors.items())),
            remarks,
            num_cut,
            counts,
        )

    def decode(self, token_ids: Int32Array, offsets: Int64Array) -> list[str]:
        """Text of each [offsets[i], offsets[i + 1]) without special tokens."""
        return self._encoder.decode(token_ids, offsets)

    def _rows(self, table: pa.Table) -> Iterator[dict[str, Any]]:
        columns = [self._values(table, name) for name in self.columns]
        if not columns:
            yield from ({} for _ in range(table.num_rows))
        for values in zip(*columns, strict=True):
            yield dict(zip(self.columns, values, strict=True))

    def _values(self, table: pa.Table, name: str) -> list[Any]:
        column = table.column(name)
        if self._prompt.messages_column is not None:
            return message_values(column)
        if self._prompt.column is not None:
            return column_values(column)
        if has_uuids(table.schema.field(name)):
            of_uuids = [pa.ExtensionArray.from_storage(pa.uuid(), c) for c in column.chunks]
            column = pa.chunked_array(of_uuids, pa.uuid())
        return template_values(column, name, stand_in)

    def _checked_draft(self, row: Mapping[str, Any], limit: PromptLimit) -> Draft:
        for name, value in row.items():
            if value is None:
                raise RowError("missing_value", f"column {name!r} is null")
            if isinstance(value, RowError):
                raise RowError(value.kind, f"column {name!r}: {value.message}")
        assert self._draft is not None
        draft = self._draft(row)
        if not draft.text.isascii():
            try:
                draft.text.encode()
            except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
                raise RowError(
                    "invalid_prompt", f"the text is not valid Unicode: {error.reason}"
                ) from None
        is_long = len(draft.text) > slice_chars_of(limit.max_tokens)
        return self._shortened(draft, limit) if is_long else draft

    def _shortened(self, draft: Draft, limit: PromptLimit) -> Draft:
        """The end that is kept of a content that will be cut, with some more than may stay.

        Raises RowError for what is far too long and is not cut.
        """
        if self._prompt.on_too_long == "error" or draft.content is None:
            self._refuse_far_too_long(draft.text, limit)
            return draft
        self._refuse_far_too_long(draft.wrap("x"), limit, " even without the row's text")
        content = self._bounded(draft.content, limit)
        shorter = Draft(draft.wrap(content), content, draft.wrap, draft.remarks)
        if len(shorter.text) <= _max_chars(limit):
            (ids,) = self._tokens([shorter.text])
            if len(ids) > limit.max_tokens:
                return shorter
        self._refuse_far_too_long(draft.text, limit)  # the template leaves most of the content out
        return draft

    def _refuse_far_too_long(self, text: str, limit: PromptLimit, when: str = "") -> None:
        if len(text) > _max_chars(limit) or len(self._bounded(text, limit)) < len(text):
            count = f"more than {limit.max_tokens}"
            raise limit.too_long(count, f" ({len(text)} characters){when}")

    def _bounded(self, text: str, limit: PromptLimit) -> str:
        keeps_end = self._prompt.on_too_long == "truncate_left"
        return self._encoder.bounded(text, limit.max_tokens, keeps_end=keeps_end)

    def _encode(self, drafts: Mapping[int, Draft]) -> dict[int, Int32Array]:
        return dict(zip(drafts, self._tokens([d.text for d in drafts.values()]), strict=True))

    def _tokens(self, texts: Sequence[str]) -> list[Int32Array]:
        return self._encoder.encode(texts, add_special_tokens=self._adds_special_tokens)

    def _cut_to_fit(
        self,
        drafts: Mapping[int, Draft],
        tokens: Mapping[int, Int32Array],
        most: Mapping[int, PromptLimit],
    ) -> tuple[dict[int, Int32Array], dict[int, RowError]]:
        """Shorten contents until each prompt fits. Returns (token ids, errors) by row."""
        contents = [draft.content or "" for draft in drafts.values()]
        spans = dict(zip(drafts, self._encoder.spans(contents), strict=True))
        num_tokens = {index: len(tokens[index]) for index in drafts}
        num_kept = {index: len(spans[index]) for index in drafts}
        fitting: dict[int, Int32Array] = {}
        errors: dict[int, RowError] = {}
        pending = list(drafts)
        for attempt in range(_MAX_CUTS):
            texts: dict[int, str] = {}
            for index in pending:
                excess = num_tokens[index] - most[index].max_tokens
                is_last = attempt == _MAX_CUTS - 1
                num_kept[index] = 0 if is_last else max(0, num_kept[index] - (excess << attempt))
                shorter = self._cut(drafts[index].content or "", spans[index], num_kept[index])
                try:
                    texts[index] = drafts[index].wrap(shorter)
                except RowError as error:  # a chat template that refuses an empty message
                    errors[index] = _without_traceback(error)
            for index, ids in zip(texts, self._tokens(list(texts.values())), strict=True):
                num_tokens[index] = len(ids)
                if len(ids) <= most[index].max_tokens:
                    fitting[index] = ids
                elif num_kept[index] == 0:
                    errors[index] = most[index].too_long(len(ids), " even without the row's text")
            pending = [i for i in pending if i not in fitting and i not in errors]
            if not pending:
                break
        return fitting, errors

    def _cut(self, content: str, spans: Int64Array, num_kept: int) -> str:
        """The content's first (or last) `num_kept` tokens, cut between characters."""
        num_dropped = len(spans) - num_kept
        if num_kept == 0 or num_dropped == 0:
            return content if num_kept else ""
        if self._prompt.on_too_long == "truncate_left":
            return content[int(spans[num_dropped - 1, 1]) :]
        return content[: int(spans[num_kept, 0])]

    def _prepare_token_ids(self, column: pa.ChunkedArray, limits: RowLimits | None) -> Prepared:
        found = read_token_ids(column, self._vocab_size)
        lengths = found.stops - found.starts
        errors = dict(found.errors)
        limit_of = [self.limit] * len(lengths)
        for index, limit in enumerate(limits or ()):
            if isinstance(limit, RowError):
                errors[index] = limit
            else:
                limit_of[index] = limit
        most = np.fromiter((limit.max_tokens for limit in limit_of), np.int64, len(lengths))
        excess = np.maximum(0, lengths - most)
        starts, stops = found.starts, found.stops
        if self._prompt.on_too_long == "truncate_left":
            starts = starts + excess
        elif self._prompt.on_too_long == "truncate_right":
            stops = stops - excess
        else:
            for index in np.flatnonzero(excess).tolist():
                errors.setdefault(index, limit_of[index].too_long(int(lengths[index])))
        for index in np.flatnonzero(lengths == 0).tolist():
            errors.setdefault(index, RowError("empty_prompt", "the prompt has no tokens"))
        is_cut = (stops - starts) < lengths
        failed = np.array(sorted(errors), dtype=np.int64)
        stops = stops.copy()
        stops[failed] = starts[failed]
        token_ids, offsets = TokenIds(found.values, starts, stops, errors).gather()
        return Prepared(token_ids, offsets, dict(sorted(errors.items())), num_cut=int(is_cut.sum()))


def _max_chars(limit: PromptLimit) -> int:
    """A longer text is too long, whatever its tokens are."""
    return max(_ALLOWED_CHARS, _MAX_CHARS_PER_TOKEN * limit.max_tokens)


def _without_traceback(error: RowError) -> RowError:
    """A new error: the old one's traceback would hold the frame, and so all the table's drafts."""
    return RowError(error.kind, error.message)
