"""`quantize`: a quantized checkpoint of an unquantized model, with a progress bar."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

import click

from batchinfer.cli.bar import Bar
from batchinfer.cli.calibration import Calibration, texts_of
from batchinfer.config import DEFAULT_ENGINE, ModelSettings
from batchinfer.engine.kinds import engine_kind
from batchinfer.errors import ConfigError, Stopped
from batchinfer.making.foreign import is_convertible
from batchinfer.making.make import make
from batchinfer.making.order import MakingOrder, Reporter
from batchinfer.making.publish import is_there, publish_folder
from batchinfer.model import read_model
from batchinfer.model.weights import read_weights
from batchinfer.quantization import Recipe, is_part
from batchinfer.signals import STOP_CODES, handled_signals, release_signals
from batchinfer.storage import is_s3, local_path
from batchinfer.storage.local_errors import os_errors


def quantize_model(
    path: str,
    out: str,
    recipe: Recipe,
    options: Mapping[str, str],
    calibration: Calibration | None,
) -> None:
    """Raises ConfigError, InputError, TransientError, Stopped. `out` is there as a whole or not.

    `options`: those of the recipe that were given.
    """
    is_kept = recipe.is_continued
    _stop_by_error("what is finished is kept: the same command continues" if is_kept else "")
    target = _target(path, out)
    if recipe.file_name is not None and (target.is_dir() or target.suffix != ".gguf"):
        raise ConfigError(f"OUT {out}: give the name of a file that ends in .gguf")
    if recipe.file_name is not None and is_part(target):
        raise ConfigError(f"OUT {out}: the name of one of several files, and one is written")
    if is_convertible(local_path(path), recipe):
        _refuse_options(path, options, calibration)
        return convert_model(local_path(path), target, recipe)
    model = read_model(ModelSettings.model_construct(path=path))
    if model.quantization != "none":
        raise ConfigError(
            f"{path} is already quantized ({model.quantization}): give the unquantized model"
        )
    options = _with_defaults(recipe, options)
    texts = texts_of(calibration) if calibration else []
    device = (machine := engine_kind(DEFAULT_ENGINE).machine()).device
    recipe, finished = recipe.on(machine), target.parent / f".{target.name}.blocks"
    with Bar() as bar:

        def fill(temporary: Path) -> None:
            order = MakingOrder(model, temporary, recipe, options, texts, finished, device)
            make(order, Reporter(bar.say, bar.move, bar.note))

        _publish(target, fill, bar, recipe.file_name)
    shutil.rmtree(finished, ignore_errors=True)
    size_bytes = read_weights(target).size_bytes
    click.echo(
        f"{target}: {recipe.meaning}; {size_bytes:,} bytes of weights, the model has "
        f"{model.weights_bytes:,}. Give it as model.path"
    )


def _with_defaults(recipe: Recipe, given: Mapping[str, str]) -> dict[str, str]:
    """Raises ConfigError if one is missing that has no default."""
    found = {}
    for option in recipe.options:
        value = given.get(option.name, option.default)
        if value is None:
            raise ConfigError(f"--method {recipe.method} needs --{option.name}: {option.meaning}")
        found[option.name] = value
    return found


def _publish(
    target: Path, fill: Callable[[Path], None], bar: Bar, file_name: str | None = None
) -> None:
    is_made = publish_folder(
        target,
        fill,
        on_wait=lambda: bar.say("waiting for another process to finish this checkpoint"),
        advice="Choose another OUT",
        file_name=file_name,
    )
    if not is_made:
        raise ConfigError(f"{target} was made by another process in the meantime")


def _target(path: str, out: str) -> Path:
    """Where OUT is. Raises ConfigError for a place that nothing may be written to."""
    if is_s3(out):
        raise ConfigError(f"OUT {out}: models are read from local folders; give one")
    # Of a link the folder it points to: renaming would fail on the link itself.
    target = Path(os.path.realpath(local_path(out)))
    source = Path(os.path.realpath(local_path(path)))
    with os_errors("look at", target):
        if source.is_dir() and (source in (target, *target.parents) or target in source.parents):
            raise ConfigError(
                f"OUT {target} and MODEL {source} are one folder, or one is inside the other: "
                "choose another OUT, so that neither becomes part of the other"
            )
        if is_there(target):
            raise ConfigError(f"{target} exists: choose another OUT, or delete it")
        # OUT is another folder that takes its name: this process and its shell would be nowhere.
        if target.is_dir() and (target.samefile(".") or target.is_mount()):
            raise ConfigError(
                f"{target} is a mount or the folder that this command was started in, and cannot "
                "be replaced: give a new folder in it as OUT"
            )
    return target


def _refuse_options(path: str, options: Mapping[str, str], calibration: Calibration | None) -> None:
    """Raise ConfigError for options that say how to code weights: these are coded."""
    found = [f"--{name}" for name in options]
    if calibration is not None:
        found.append("--calibration and --column")
    if found:
        raise ConfigError(
            f"{path} is a model as its method's authors write it: its weights are coded already "
            f"and are only rewritten, so leave out {', '.join(found)}"
        )


def convert_model(source: Path, target: Path, recipe: Recipe) -> None:
    """Store the weights of a model in its authors' format in ours: nothing is quantized again."""
    assert recipe.convert is not None
    convert = importlib.import_module(recipe.convert).convert
    with Bar() as bar:
        bar.say("rewriting the coded layers")

        def fill(temporary: Path) -> None:
            convert(source, temporary, lambda done, total: bar.move(done / total))

        _publish(target, fill, bar)
    click.echo(
        f"{target}: the weights of {source}, in the format that runs here. Give it as model.path"
    )


def _stop_by_error(what_is_left: str) -> None:
    """A signal ends the command as an error does: what was begun is deleted."""

    def stop(number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        left = what_is_left or "nothing was written"
        raise Stopped(f"received {name}: {left}", STOP_CODES[signal.Signals(number)])

    for number in handled_signals():
        signal.signal(number, stop)
    release_signals()
