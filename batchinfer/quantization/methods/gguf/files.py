"""GGUF files without their weights: metadata, where each tensor lies, and whether it is all there.

Everything is held against the length of the file, since llama.cpp maps the file and reads where the
header points to. Must not know: what the metadata mean.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from batchinfer.errors import ConfigError
from batchinfer.quantization.methods.base import Tensor

GGUF_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
#: More than any model has; a damaged count is not worked off until the memory is full.
_MAX_ENTRIES = 1 << 24
_MAX_DIMENSIONS = 4
#: Of a file that is one of several, as llama.cpp names them.
_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

#: Number of a tensor's type -> its name, weights in a block, bytes of a block.
TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}  # fmt: skip
#: Number of a value's type -> how `struct` reads it.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


class Texts(NamedTuple):
    """An array of texts, of which the number is enough: a vocabulary, its merges."""

    num: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """`metadata`: arrays of numbers as tuples, of texts as `Texts`."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]  # in the order of safetensors' shapes: outputs first
    header_sha256: str  # of everything before the weights
    tokenizer_sha256: str  # of the metadata that say what a text becomes


def is_gguf(file: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    try:
        if not file.is_file():  # a pipe without a writer would be waited for
            return False
        with file.open("rb") as stream:
            return stream.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False


def is_part(file: Path) -> bool:
    """Whether a name says that the file is one of several."""
    match = _NUMBERED.fullmatch(file.name)
    return match is not None and match.groups()[1:] != ("00001", "00001")


def parts_of(file: Path) -> list[Path]:
    """The files of a model, if `file` is named as one of several; else that file alone.

    Raises ConfigError if one of them is missing.
    """
    if not (match := _NUMBERED.fullmatch(file.name)):
        return [file]
    stem, count = match[1], int(match[3])
    files = [file.parent / f"{stem}-{n:05}-of-{count:05}.gguf" for n in range(1, count + 1)]
    if missing := [part.name for part in files if not part.exists()]:
        raise ConfigError(
            f"{file.parent} lacks {len(missing)} of the {count} files of this model, such as "
            f"{missing[0]}: copy them"
        )
    return files


def gguf_models(folder: Path) -> list[Path]:
    """The first file of each model in a folder, by name."""
    files = [file for file in sorted(folder.glob("*.gguf")) if is_gguf(file)]
    firsts = []
    for file in files:
        match = _NUMBERED.fullmatch(file.name)
        if match is None or int(match[2]) == 1 or not _has_first(file, match, files):
            firsts.append(file)
    return firsts


def _has_first(file: Path, match: re.Match[str], files: list[Path]) -> bool:
    """Whether an earlier file of the same model is there."""
    return any(
        (other := _NUMBERED.fullmatch(earlier.name)) is not None
        and (other[1], other[3]) == (match[1], match[3])
        for earlier in files[: files.index(file)]
    )


def read_gguf(file: Path) -> GgufFile:
    """The header of a file. Raises ConfigError for one that is damaged, cut short or of a later
    version of the format.
    """
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as data:
            return _Reader(file, data).read()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}. Check its mode") from error
    except ValueError as error:  # mmap's, of an empty file
        raise ConfigError(f"{file} is empty: copy it again") from error


class _Reader:
    """Reads a header from its start on. What is outside the file ends it."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self._file, self._data, self._size = file, data, len(data)
        self._at = 0

    def read(self) -> GgufFile:
        if self._take(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise ConfigError(f"{self._file} is not a GGUF file: its first bytes are different")
        self._check_version(self._number("I"))
        num_tensors, num_keys = self._count(), self._count()
        tokenizer = hashlib.sha256()
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            start, key = self._at, self._text()
            if key in metadata:
                self._refuse(f"its header gives {key} twice")
            metadata[key] = self._value(self._number("I"))
            if key.startswith("tokenizer."):
                tokenizer.update(self._data[start : self._at])
        places = self._places(num_tensors)
        header_sha256 = hashlib.sha256(self._data[: self._at]).hexdigest()
        tensors = self._tensors(places, metadata)
        return GgufFile(self._file, metadata, tensors, header_sha256, tokenizer.hexdigest())

    def _check_version(self, version: int) -> None:
        if version in _VERSIONS:
            return
        if version & 0xFFFF == 0 and version:
            raise ConfigError(f"{self._file} was made for big-endian machines: take another file")
        raise ConfigError(
            f"{self._file} is of version {version} of the GGUF format, and versions "
            f"{' and '.join(map(str, _VERSIONS))} are read: take another file of the model"
        )

    def _places(self, num_tensors: int) -> dict[str, tuple[int, tuple[int, ...], int]]:
        """Tensor -> its type, its shape, where it begins after the header."""
        places: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(num_tensors):
            name, num_dimensions = self._text(), self._number("I")
            if name in places or not 0 < num_dimensions <= _MAX_DIMENSIONS:
                self._refuse(f"its header gives {name} {num_dimensions} dimensions, or gives twice")
            shape = tuple(self._number("Q") for _ in range(num_dimensions))
            kind = self._number("I")
            if kind not in TYPES:
                raise ConfigError(
                    f"{self._file}: {name} is of type {kind}, which this version does not know, or "
                    "the file is damaged: take another file of the model"
                )
            places[name] = (kind, shape, self._number("Q"))
        return places

    def _tensors(
        self, places: Mapping[str, tuple[int, tuple[int, ...], int]], metadata: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            self._refuse(f"general.alignment is {alignment!r}")
        start = _aligned(self._at, alignment)
        tensors, end, expected = {}, self._at, 0
        for name, (kind, shape, offset) in places.items():
            type_name, block, block_bytes = TYPES[kind]
            num_weights = math.prod(shape)
            if min(shape) == 0 or shape[0] % block or num_weights >= 1 << 62:
                self._refuse(f"its header gives {name}, {type_name}, the shape {list(shape)}")
            num_bytes = num_weights // block * block_bytes
            if offset != expected:
                self._refuse(
                    f"its header has {name} at byte {offset}, where {expected} is its place"
                )
            tensors[name] = Tensor(type_name, shape[::-1], num_bytes)
            end = start + offset + num_bytes
            expected = _aligned(offset + num_bytes, alignment)
        if end > self._size:
            raise ConfigError(
                f"{self._file} has {self._size:,} bytes, its header says {end:,}: it is truncated, "
                "copy it again"
            )
        return tensors

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _ARRAY:
            self._refuse(f"its header has a value of type {kind} before byte {self._at}")
        of, num = self._number("I"), self._count()
        if of == _STRING:
            for _ in range(num):
                self._take(self._number("Q"))
            return Texts(num)
        if of not in _SCALARS:
            self._refuse(f"its header has a list of type {of} before byte {self._at}")
        code = f"<{num}{_SCALARS[of]}"
        return struct.unpack(code, self._take(struct.calcsize(code)))

    def _text(self) -> str:
        return self._take(self._number("Q")).decode("utf-8", "replace")

    def _count(self) -> int:
        count: int = self._number("Q")
        if count > _MAX_ENTRIES:
            self._refuse(f"its header counts {count} entries before byte {self._at}")
        return count

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _take(self, num_bytes: int) -> bytes:
        end = self._at + num_bytes
        if end > self._size:
            raise ConfigError(
                f"{self._file} is truncated within its header, or damaged ({self._size:,} bytes): "
                "copy it again"
            )
        taken, self._at = self._data[self._at : end], end
        return taken

    def _refuse(self, what: str) -> NoReturn:
        raise ConfigError(f"{self._file} is damaged: {what}. Copy it again")


def _aligned(offset: int, alignment: int) -> int:
    return (offset + alignment - 1) // alignment * alignment
