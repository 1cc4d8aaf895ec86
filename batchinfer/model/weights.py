"""Weight files without their weights: sizes, dtypes, and whether each file is whole.

Must not know: what the tensors are for. A safetensors file says in its header where each tensor
lies, so a copy that was cut short is found without reading it. Whether tensors are missing is seen
in `complete`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from batchinfer.errors import ConfigError
from batchinfer.model.folder import read_json
from batchinfer.quantization import Tensor, parts_of

_WEIGHTS_INDEX = "model.safetensors.index.json"
#: One of several files, as transformers names them.
_NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)\.\w+")

#: Bits of a number, by safetensors' names. Of a dtype that is not here no size is known.
DTYPE_BITS: Mapping[str, int] = {
    "C64": 64, "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16,
    "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@dataclass(slots=True)
class Weights:
    size_bytes: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)  # none of pytorch_model.bin
    file_names: dict[str, str] = field(default_factory=dict)  # tensor -> the file that holds it
    dtypes: dict[str, int] = field(default_factory=dict)  # safetensors dtype -> bytes
    sha256: str = ""


def read_weights(folder: Path) -> Weights:
    """Sizes, dtypes and hash of the weight files, each checked to be whole."""
    weights = Weights()
    digest = hashlib.sha256()
    for file in weight_files(folder):
        size_bytes = file.stat().st_size
        header = b""
        if file.suffix == ".safetensors":
            header, tensors = read_header(file)
            weights.tensors |= tensors
            weights.file_names |= dict.fromkeys(tensors, file.name)
            for tensor in tensors.values():
                kind = tensor.dtype
                weights.dtypes[kind] = weights.dtypes.get(kind, 0) + tensor.num_bytes
        weights.size_bytes += size_bytes
        digest.update(f"{file.name}\0{size_bytes}\0{hashlib.sha256(header).hexdigest()}\n".encode())
    weights.sha256 = digest.hexdigest()
    return weights


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights. Raises ConfigError if one is missing.

    `folder`: of a GGUF model its first file.
    """
    if folder.is_file():
        return parts_of(folder)
    index = folder / _WEIGHTS_INDEX
    if index.exists():
        weight_map = read_json(index, "").get("weight_map", {})
        is_map = isinstance(weight_map, dict)
        if not is_map or not all(name and isinstance(name, str) for name in weight_map.values()):
            raise ConfigError(
                f"{index}: weight_map must name a file for each tensor. Copy it again"
            )
        files = sorted({folder / name for name in weight_map.values()})
        if missing := [file.name for file in files if not file.exists()]:
            raise ConfigError(
                f"{folder} lacks {len(missing)} of {len(files)} weight files of {_WEIGHTS_INDEX}, "
                f"such as {missing[0]}: copy them"
            )
    else:
        # `consolidated` is a second copy of the same weights in another layout.
        found = sorted(folder.glob("*.safetensors"))
        own = [file for file in found if not file.name.startswith("consolidated")]
        files = own or found or sorted(folder.glob("pytorch_model*.bin"))
        _check_numbers([file.name for file in files], folder)
    if not files:
        raise ConfigError(f"{folder} has no weights (*.safetensors): copy the whole model folder")
    return files


def _check_numbers(names: Iterable[str], folder: Path) -> None:
    """Raise ConfigError if a name says that there are files which are not there.

    Only for folders without an index, which is the better authority.
    """
    sets: dict[tuple[str, int], dict[int, str]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            stem, number, count = match[1], int(match[2]), int(match[3])
            sets.setdefault((stem, count), {})[number] = name
    for (_, count), found in sets.items():
        first = min(1, *found)  # some tools begin at 0, and end at `count` or before it
        missing = [number for number in range(first, first + count) if number not in found]
        if missing:
            raise ConfigError(
                f"{folder} lacks {len(missing)} of {count} weight files, such as number "
                f"{missing[0]} beside {min(found.values())}: copy the model again"
            )


def read_header(file: Path) -> tuple[bytes, dict[str, Tensor]]:
    """A safetensors file's JSON header and its tensors.

    Raises ConfigError if the file is not as long as the header says.
    """
    size_bytes = file.stat().st_size
    with file.open("rb") as stream:
        num_header_bytes = int.from_bytes(stream.read(8), "little")
        if size_bytes < 8 or 8 + num_header_bytes > size_bytes:
            raise ConfigError(
                f"{file} is truncated within its header ({size_bytes} bytes): copy it again"
            )
        header = stream.read(num_header_bytes)
    tensors = {}
    places = []
    try:
        for name, tensor in json.loads(header).items():
            if name != "__metadata__":
                start, end = map(int, tensor["data_offsets"])
                shape = tuple(map(int, tensor["shape"]))
                tensors[name] = Tensor(str(tensor["dtype"]), shape, end - start)
                places.append((start, end, name))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} has no valid safetensors header: copy it again") from error
    data_bytes = 0
    for start, end, name in sorted(places):
        if start != data_bytes or end < start:
            raise ConfigError(
                f"{file} is damaged: its header has {name} at bytes {start} to {end}, where the "
                f"tensors before it end at {data_bytes}. Copy it again"
            )
        if not _is_size(tensors[name]):
            dtype, shape, num_bytes = tensors[name]
            raise ConfigError(
                f"{file} is damaged: its header gives {name}, {dtype} {list(shape)}, {num_bytes} "
                "bytes. Copy it again"
            )
        data_bytes = end
    expected = 8 + num_header_bytes + data_bytes
    if size_bytes != expected:
        raise ConfigError(
            f"{file} has {size_bytes} bytes, its header says {expected}: it is truncated or "
            "damaged, copy it again"
        )
    return header, tensors


def _is_size(tensor: Tensor) -> bool:
    bits = DTYPE_BITS.get(tensor.dtype)
    return bits is None or math.prod(tensor.shape) * bits == 8 * tensor.num_bytes
