"""Rows of results as OpenAI's responses.

Must not know: files. Ids are made of the batch and the line, so an answer that is written again is
the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from batchinfer.openai_batch.keys import CHAT
from batchinfer.openai_batch.lines import Refusal
from batchinfer.prompt.encode import TokenEncoder

#: Errors of rows that are not the line's own fault.
_SERVER_ERRORS = frozenset({"engine_error"})
_CODES = {"prompt_too_long": "context_length_exceeded"}

Row = Mapping[str, Any]


def refusal_of(rows: Sequence[Row]) -> Refusal | None:
    """Why a line has no answer; None if it has."""
    for row in rows:
        if row["refusal"] is not None:
            return Refusal(**json.loads(row["refusal"]))
        if row["error_type"] is not None:
            kind = str(row["error_type"])
            status = 500 if kind in _SERVER_ERRORS else 400
            return Refusal(str(row["error_message"]), _CODES.get(kind, kind), status=status)
    return None


class Answers:
    """`batch`: what tells one from another. `model`: its name where a line says none."""

    def __init__(self, batch: str, model: str, encoder: TokenEncoder | None) -> None:
        """`encoder`: for the texts of tokens, which logprobs have."""
        self._batch, self._model, self._encoder = batch, model, encoder
        self._texts: dict[int, str] = {}

    def answered(self, line: int, rows: Sequence[Row]) -> dict[str, Any]:
        """The line of a request that has its answers."""
        return self._line(line, rows[0]["custom_id"], 200, self._body(line, rows))

    def refused(self, line: int, custom_id: str | None, refusal: Refusal) -> dict[str, Any]:
        kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
        error = {
            "message": refusal.message,
            "type": kind,
            "param": refusal.param,
            "code": refusal.code,
        }
        found = self._line(line, custom_id, refusal.status, {"error": error})
        found["error"] = {"code": refusal.code, "message": refusal.message, "line": line}
        return found

    def _line(
        self, line: int, custom_id: str | None, status: int, body: Mapping[str, Any]
    ) -> dict[str, Any]:
        response = {"status_code": status, "request_id": self._id("req", line), "body": body}
        return {
            "id": self._id("batch_req", line),
            "custom_id": custom_id,
            "response": response,
            "error": None,
        }

    def _id(self, kind: str, line: int) -> str:
        digest = hashlib.blake2b(f"{self._batch}\0{line}".encode(), digest_size=12)
        return f"{kind}{'-' if kind.startswith('c') else '_'}{digest.hexdigest()}"

    def _body(self, line: int, rows: Sequence[Row]) -> dict[str, Any]:
        is_chat = rows[0]["url"] == CHAT
        rows = sorted(rows, key=lambda row: row["choice"])
        prompt_tokens = sum({row["prompt"]: row["num_prompt_tokens"] for row in rows}.values())
        completion_tokens = sum(row["num_completion_tokens"] for row in rows)
        return {
            "id": self._id("chatcmpl" if is_chat else "cmpl", line),
            "object": "chat.completion" if is_chat else "text_completion",
            "created": int(max(row["finished_at"] for row in rows).timestamp()),
            "model": rows[0]["model"] or self._model,
            "choices": [(self._chat_choice if is_chat else self._choice)(row) for row in rows],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }

    def _chat_choice(self, row: Row) -> dict[str, Any]:
        message = {"role": "assistant", "content": row["completion"], "refusal": None}
        if (reasoning := row.get("reasoning")) is not None:
            message["reasoning"] = reasoning
        logprobs = None
        if row["token_logprobs"] is not None:
            logprobs = {"content": self._chat_logprobs(row)}
        return {"index": row["choice"], "message": message, **self._end(row, logprobs)}

    def _choice(self, row: Row) -> dict[str, Any]:
        logprobs = None if row["token_logprobs"] is None else self._logprobs(row)
        thought = row.get("reasoning")
        found = {"index": row["choice"], "text": row["completion"] or ""}
        if thought is not None:
            found["reasoning"] = thought
        return {**found, **self._end(row, logprobs)}

    def _end(self, row: Row, logprobs: Any) -> dict[str, Any]:
        reason: int | str | None = row["stop_reason"]
        if isinstance(reason, str) and reason.isdecimal() and _ended_by(row, int(reason)):
            reason = int(reason)
        found = {
            "logprobs": logprobs,
            "finish_reason": row["finish_reason"],
            "stop_reason": reason,
        }
        if row["returns_token_ids"]:
            found["token_ids"] = row["token_ids"]
        return found

    def _chat_logprobs(self, row: Row) -> list[dict[str, Any]]:
        found = []
        tops = _tops(row)
        for index, (token_id, logprob) in enumerate(
            zip(row["token_ids"], row["token_logprobs"], strict=True)
        ):
            top = [self._token(other, value) for other, value in tops[index]]
            found.append({**self._token(token_id, logprob), "top_logprobs": top})
        return found

    def _logprobs(self, row: Row) -> dict[str, Any]:
        tokens = [self._text(token_id) for token_id in row["token_ids"]]
        offsets = np.cumsum([0, *map(len, tokens)])[:-1].tolist()
        tops = [
            {self._text(other): _finite(value) for other, value in top} or None
            for top in _tops(row)
        ]
        return {
            "text_offset": offsets,
            "token_logprobs": [_finite(value) for value in row["token_logprobs"]],
            "tokens": tokens,
            "top_logprobs": tops,
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._text(token_id)
        content = list(text.encode("utf-8", "replace"))
        return {"token": text, "logprob": _finite(logprob), "bytes": content}

    def _text(self, token_id: int) -> str:
        """Of a token alone; a special one's is its name."""
        if token_id not in self._texts:
            assert self._encoder is not None
            special = self._encoder.special_tokens.get(token_id)
            if special is None:
                ids = np.array([token_id], np.int32)
                (special,) = self._encoder.decode(ids, np.array([0, 1], np.int64))
            self._texts[token_id] = special
        return self._texts[token_id]


def _finite(logprob: float) -> float:
    """JSON has no infinity: OpenAI's word for a token that cannot come."""
    return max(logprob, -9999.0)


def _tops(row: Row) -> list[list[tuple[int, float]]]:
    """(token, logprob) of the likeliest at each position."""
    if row.get("top_token_ids") is None:
        return [[] for _ in row["token_ids"]]
    pairs = zip(row["top_token_ids"], row["top_logprobs"], strict=True)
    return [list(zip(ids, values, strict=True)) for ids, values in pairs]


def _ended_by(row: Row, token_id: int) -> bool:
    return bool(row["token_ids"]) and row["token_ids"][-1] == token_id
