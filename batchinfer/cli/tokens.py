"""Tokens as text on a terminal: special tokens marked, probabilities as colours.

Must not know: engines, jobs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TextIO

import click
import numpy as np

from batchinfer.engine.base import Int32Array
from batchinfer.engine.demands.completion import Completion
from batchinfer.errors import printable
from batchinfer.prompt.encode import TokenEncoder

#: Least probability -> colour of the token; the last is of all below.
_COLOURS = ((0.9, "green"), (0.5, "yellow"), (0.1, "magenta"), (0.0, "red"))
_UNFINISHED = "\ufffd"


class Screen:
    """A stream for people. On a terminal with colours."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.has_colours = stream.isatty()

    def write(self, text: str, **style: object) -> None:
        """Immediately. No control characters, whatever a model says."""
        text = printable(text)
        click.echo(
            click.style(text, **style) if style and text else text,  # type: ignore[arg-type]
            file=self._stream,
            nl=False,
            color=self.has_colours,
        )
        self._stream.flush()

    def line(self, text: str = "", **style: object) -> None:
        self.write(text, **style)
        self.write("\n")

    def special(self, text: str) -> None:
        """A special token: in colour, or in brackets that no tokenizer has."""
        if self.has_colours:
            self.write(text, fg="cyan", reverse=True)
        else:
            self.write(f"⟦{text}⟧")

    def token(self, text: str, logprob: float | None) -> None:
        """Coloured by its probability, where that is known."""
        if logprob is None:
            self.write(text)
        else:
            self.write(text, fg=_colour(logprob))

    def legend(self) -> None:
        for least, colour in _COLOURS:
            words = f"{least:.0%} and more" if least else "less"
            self.write(f" {words} ", fg=colour)
        self.line()


def _colour(logprob: float) -> str:
    return next(colour for least, colour in _COLOURS if math.exp(logprob) >= least)


def show_prompt(screen: Screen, encoder: TokenEncoder, token_ids: Int32Array) -> None:
    """A prompt as it is sent."""
    text = ""
    for text, is_special in encoder.pieces(token_ids):
        (screen.special if is_special else screen.write)(text)
    if not text.endswith("\n"):
        screen.line()


@dataclass(frozen=True, slots=True)
class Piece:
    """What a token adds to the text. `text` is empty while a character is not complete."""

    token_id: int
    text: str
    is_special: bool
    logprob: float | None


class Pieces:
    """The tokens of a completion that grows, each once.

    A token's text is what the text gets longer by: spaces, and characters of several tokens, depend
    on what is before.
    """

    def __init__(self, encoder: TokenEncoder) -> None:
        self._decode: Callable[..., list[str]] = encoder.decode
        self._special = encoder.special_tokens
        self._num_seen = 0
        self._text = ""

    def of(self, completion: Completion) -> Iterator[Piece]:
        """Those that are new since the last call."""
        token_ids, logprobs = completion.token_ids, completion.token_logprobs
        while self._num_seen < len(token_ids):
            index = self._num_seen
            self._num_seen += 1
            token_id = int(token_ids[index])
            logprob = None if logprobs is None else float(logprobs[index])
            if (special := self._special.get(token_id)) is not None:
                yield Piece(token_id, special, True, logprob)
                continue
            whole = token_ids[: self._num_seen]
            text = self._decode(whole, np.array([0, len(whole)]))[0].rstrip(_UNFINISHED)
            # The engine holds back what may be a stop text.
            if completion.text is not None and not completion.is_split:
                text = text[: len(completion.text)]
            added = text[len(self._text) :] if text.startswith(self._text) else ""
            self._text += added
            yield Piece(token_id, added, False, logprob)

    def rest(self, text: str) -> str:
        """What a finished text has after what was given out: bytes that are not characters."""
        return text[len(self._text) :] if text.startswith(self._text) else ""
