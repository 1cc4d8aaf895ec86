"""Checkpoints that jobs need and their models lack: made once for this user, then found.

They are in `$XDG_CACHE_HOME/batchinfer/models` (by default below ~/.cache) under a name that
follows from the content of the model's files and from how the checkpoint is made, and from nothing
else: a copy of a model, whatever its folder is called, finds what was made of it, and two models of
one shape never share. Each folder may be deleted at any time. Must not know: jobs, engines.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from batchinfer.errors import ConfigError
from batchinfer.making.publish import publish_folder, sweep
from batchinfer.model import ModelFacts
from batchinfer.model.folder import content_digest, read_json
from batchinfer.model.weights import read_weights, weight_files
from batchinfer.quantization import RECIPES
from batchinfer.storage import local_path

logger = logging.getLogger("batchinfer.making")

_HASH_THREADS = 8
_SAY_EVERY_S = 10.0


def user_cache() -> Path:
    """Where this program keeps what it can make again."""
    return local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "batchinfer"


def describe_cache() -> tuple[bool, str]:
    """Whether checkpoints can be made here, and where, how many there are, how large. For people.

    Writes nothing: the folder need not be there yet.
    """
    try:
        folder = user_cache() / "models"
    except ConfigError:
        return False, "no home folder is known: set XDG_CACHE_HOME to a folder that can be written"
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        return False, f"{folder} cannot be written: set XDG_CACHE_HOME to a folder that can"
    made = [path for path in folder.glob("[!.]*") if path.is_dir()]
    num_bytes = sum(map(_num_bytes, made))
    return True, f"{folder}: {len(made):,} made checkpoints, {num_bytes:,} bytes"


def _num_bytes(folder: Path) -> int:
    total = 0
    with contextlib.suppress(OSError):  # deleted meanwhile
        for file in folder.iterdir():
            total += file.stat().st_size
    return total


def cached_checkpoint(model: ModelFacts) -> Path:
    """The folder of the quantized checkpoint that `model` says has to be made of it.

    Raises ConfigError, TransientError (disk full).
    """
    assert model.made_by is not None
    recipe = RECIPES[model.made_by]
    source = Path(model.path)
    folder = user_cache() / "models"
    target = folder / f"{recipe.method}-{content_key(source, recipe.identity, folder)}"
    advice = (
        "Set XDG_CACHE_HOME to a folder that can be written and has room for it, or make the "
        f"checkpoint with `batchinfer quantize {source} OUT --method {recipe.method}` and give "
        "OUT as model.path"
    )

    def fill(temporary: Path) -> None:
        from batchinfer.making.rounding_writer import round_to_nearest

        sweep(folder)
        logger.info("quantizing %s once (%s), into %s", source, recipe.meaning, target)
        begun_s = time.monotonic()
        said = _Progress()
        made = round_to_nearest(source, temporary, recipe, said)
        logger.info(
            "quantized %d of %d linear layers in %.1f s",
            made.num_quantized,
            made.num_linear,
            time.monotonic() - begun_s,
        )

    def on_wait() -> None:
        logger.info("another process makes %s: waiting for it", target)

    if not publish_folder(target, fill, on_wait=on_wait, advice=advice):
        logger.info("the quantized checkpoint is %s", target)
    try:
        read_weights(target)
        read_json(target / "config.json", "a model folder needs it")
    except ConfigError as error:
        raise ConfigError(
            f"the checkpoint {target}, which was made earlier, is damaged ({error}): delete that "
            "folder, the next start makes it again"
        ) from error
    return target


def model_hashes(source: Path) -> dict[str, str]:
    """File -> sha256, for every file of a model folder that decides what the model computes.

    A file is read once and its hash noted below the cache, for as long as nobody touches it. Raises
    ConfigError for a folder without weights.
    """
    return _hashes(source, user_cache() / "models")


class _Progress:
    """A line in the log now and then."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        if time.monotonic() > self._last_s + _SAY_EVERY_S:
            self._last_s = time.monotonic()
            logger.info("quantizing: %.0f %%", 100 * done_bytes / total_bytes)


def content_key(source: Path, made_by: str, folder: Path) -> str:
    """Names the content of all files of the model, and how something is made of it.

    What files hash to is noted in `folder`.

    The job's digest knows weights by their shapes, as it is asked for at every start: fine-tuned
    models of one base would be equal. And it knows what the checkpoint has no part of: adapters,
    tokenizers of other folders.
    """
    lines = _hashes(source, folder) | {"made by": made_by}
    text = "\n".join(f"{name}\0{value}" for name, value in sorted(lines.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _hashes(source: Path, folder: Path) -> dict[str, str]:
    """File -> sha256 of its content, for every file of a model that decides what it computes."""
    files = weight_files(source)
    with ThreadPoolExecutor(_HASH_THREADS, thread_name_prefix="hash") as pool:
        hashes = list(pool.map(lambda file: _sha256(file, folder / ".hashes"), files))
    lines = content_digest(source, source)
    return lines | {file.name: digest for file, digest in zip(files, hashes, strict=True)}


def _sha256(file: Path, notes: Path) -> str:
    """Digest of the content, noted until the file is touched (2 GB take a second)."""
    stat = file.stat()
    seen = (file.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    note = notes / hashlib.sha256(repr(seen).encode()).hexdigest()
    with contextlib.suppress(OSError):
        if len(found := note.read_text(encoding="ascii")) == 64:
            return found
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    with contextlib.suppress(OSError):  # no note: the next start reads the file again
        notes.mkdir(parents=True, exist_ok=True)
        temporary = notes / f".{uuid.uuid4().hex}.tmp"
        temporary.write_text(digest, encoding="ascii")
        temporary.replace(note)
    return digest
