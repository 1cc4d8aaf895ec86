"""A verdict as it is passed on: numbers, a line for people, a block for the JSON line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Bound = Literal[
    "compute",
    "memory bandwidth",
    "KV room",
    "host",
    "input",
    "tail",
    "step overhead",
    "unknown",
]

_MEANINGS: dict[Bound, str] = {
    "compute": "the device's arithmetic",
    "memory bandwidth": "the device's memory bandwidth",
    "KV room": "the room of the KV cache: rows waited for it",
    "host": "this process between the engine's steps",
    "input": "reading, tokenizing or writing: the engine waited for rows",
    "tail": "its end: too few rows were left to fill a step",
    "step overhead": "what a step costs beside its arithmetic and memory traffic",
    "unknown": "",
}


@dataclass(frozen=True, slots=True)
class Lever:
    """The setting that would help most, by the arithmetic of `judge`."""

    setting: str
    value: str | int | float | bool
    expected_gain: float | None  # share of tokens/s; None: it helps, by how much is not known
    changes_tokens: bool

    @property
    def gain(self) -> str:
        """In words; empty: not known."""
        return "" if self.expected_gain is None else f"about +{_percent(self.expected_gain)}"

    def __str__(self) -> str:
        shown = str(self.value).lower() if isinstance(self.value, bool) else str(self.value)
        tokens = "changes tokens" if self.changes_tokens else "same tokens but for rounding"
        return ", ".join(word for word in (f"{self.setting}: {shown}", self.gain, tokens) if word)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Shares are None where the device's peaks, or the model's work, are unknown."""

    bound: Bound
    tokens_per_s: float
    device: str
    peaks: str | None  # "table", "measured"; None: unknown
    share_of_roof: float | None  # of the time that the same steps would take at the peaks
    compute: float | None  # of the peak, over the whole time
    memory_bandwidth: float | None  # likewise
    kv_room: float | None  # of the KV cache that was held on average
    host: float  # of the time, between steps
    waiting: float  # of the time, for input or storage
    tail: float  # of the time, in steps with too few rows after the last admission
    lever: Lever | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        lever = self.lever
        return {
            "bound": self.bound,
            "tokens_per_s": round(self.tokens_per_s, 1),
            "device": self.device,
            "peaks": self.peaks,
            "share_of_roof": _rounded(self.share_of_roof),
            "compute": _rounded(self.compute),
            "memory_bandwidth": _rounded(self.memory_bandwidth),
            "kv_room": _rounded(self.kv_room),
            "host": _rounded(self.host),
            "waiting": _rounded(self.waiting),
            "tail": _rounded(self.tail),
            "setting": None
            if lever is None
            else {
                "key": lever.setting,
                "value": lever.value,
                "expected_gain": _rounded(lever.expected_gain),
                "changes_tokens": lever.changes_tokens,
            },
            "text": str(self),
        }

    def __str__(self) -> str:
        words = [f"{self.tokens_per_s:,.0f} tokens/s"]
        if self.share_of_roof is not None:
            of = "" if self.peaks == "table" else " as measured"
            words.append(f"{_percent(self.share_of_roof)} of the roof of {self.device}{of}")
        else:
            words.append(f"share of the roof unknown ({self.device})")
        if self.bound != "unknown":
            words.append(f"bound by {_MEANINGS[self.bound]}")
        shares = [
            f"{name} {_percent(share)}"
            for name, share in (
                ("compute", self.compute),
                ("memory bandwidth", self.memory_bandwidth),
                ("KV room", self.kv_room),
                ("host", self.host),
                ("waiting", self.waiting),
                ("tail", self.tail),
            )
            if share is not None
        ]
        line = f"{', '.join(words)} ({', '.join(shares)})"
        return line if self.lever is None else f"{line}; {self.lever}"


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 4)


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")
