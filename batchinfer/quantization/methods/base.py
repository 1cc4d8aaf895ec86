"""What a quantization method is: plain data and pure functions, all of one method in its folder.

A method recognises checkpoints by config.json (`scheme_of`), holds their stored tensors against
those settings (`check_stored`), says what they take once loaded, how one is made of an unquantized
model (`Recipe.write`), and brings its own code to an engine that lacks it (`vllm`). What needs
torch or an engine is named by a dotted module and imported late, where it runs. Must not know:
which methods there are, files, how an engine works (a plug-in names the one that it is for).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from batchinfer.errors import ConfigError
from batchinfer.quantization.machine import Machine
from batchinfer.quantization.support import ALL_DTYPES as ALL_DTYPES  # for records
from batchinfer.quantization.support import DeviceSupport as DeviceSupport
from batchinfer.quantization.support import support_of

#: config.json's `quantization_config`, or its like.
Settings = Mapping[str, Any]

#: A scheme for layers that have several of those known: the engine sorts them out.
MIXED = "mixed"

#: Environment variable of processes that compute: 1 where a CPU keeps coded weights packed in
#: memory and decodes them in every step (`Method.why_not_packed`).
KEEP_PACKED = "BATCHINFER_KEEP_PACKED"

#: What unquantized weights and their buffers are stored as.
_PLAIN_DTYPES = ("F64", "F32", "F16", "BF16", "BOOL", "I64", "U64")


class Tensor(NamedTuple):
    """As a safetensors header describes it."""

    dtype: str  # safetensors' name for it: BF16, U8, F8_E4M3, ...
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def is_packed(self) -> bool:
        """Whether it is of a quantized weight, not an attention mask, as old models store them."""
        *outer, rows, columns = (1, 1, *self.shape)
        is_mask = len(self.shape) == 4 and rows == columns and set(outer) == {1}
        return self.dtype not in _PLAIN_DTYPES and not is_mask


class Loading(NamedTuple):
    """What decides how much memory a checkpoint's tensors take once they are loaded."""

    scheme: str
    device: str | None  # as in `Machine`
    dtype_bytes: int  # of a number of the dtype that the model is computed in
    keeps_packed: bool = False  # on a CPU, which would else decode them


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint's tensors beside what its settings say of them."""

    scheme: str
    words: str  # what the settings say it is, for messages
    settings: Settings
    tensors: Mapping[str, Tensor]
    dtypes: Mapping[str, int]  # safetensors dtype -> bytes
    folder: str
    #: config.json's settings of a language model; empty for one within another model.
    text: Mapping[str, Any] = field(default_factory=dict)

    def contradiction(self, what: str) -> ConfigError:
        return ConfigError(
            f"{self.folder}: its settings say {what}: config.json and the weights are not of one "
            "checkpoint, copy it again"
        )

    def not_as_said(self) -> ConfigError:
        most = max(self.dtypes, key=lambda name: self.dtypes[name])
        return self.contradiction(f"{self.words}, but most of its weights are stored as {most}")


def check_packed(stored: Stored) -> None:
    """Raise ConfigError if no tensor is of a quantized weight. What most methods' checkpoints need.

    A few packed layers among many that stayed as they were may be right.
    """
    if not any(tensor.is_packed and tensor.num_bytes for tensor in stored.tensors.values()):
        raise stored.not_as_said()


@dataclass(frozen=True, slots=True)
class Quantization:
    """One name. How an engine runs it on a device is in that engine's table (`support`)."""

    name: str
    meaning: str
    bits_per_weight: float  # of a quantized layer, its scales included, at the usual group size
    schemes: tuple[str, ...]  # what a checkpoint of this name can be, whether it runs here or not
    how_to_make: str
    takes_plain: bool = False  # it says what weights become; other names say what the files are
    dtype: str | None = None  # the one that is its whole meaning: of fp32, fp16 and bf16
    types: tuple[str, ...] = ()  # what weights can be stored as, where the files say it themselves
    #: (engine, device) -> how the method's own code runs there; else the engine's table says it.
    support: Mapping[tuple[str, str], DeviceSupport | str] = field(default_factory=dict)

    def on(self, machine: Machine) -> DeviceSupport | str:
        """How it runs there, or why it does not; on an unknown device as on a GPU."""
        key = (machine.engine, machine.device or "cuda")
        if key in self.support:
            return self.support[key]
        return support_of(machine).names.get(self.name, "not yet in this version")


def quantize_command(recipe: str) -> str:
    return f"`batchinfer quantize MODEL OUT --method {recipe}`"


@dataclass(frozen=True, slots=True)
class Option:
    """An option of `batchinfer quantize` that a recipe takes, `--NAME`."""

    name: str
    meaning: str  # for `--help`
    values: range | tuple[str, ...]  # of words the usual one first
    is_needed: bool = False  # there is no usual one

    @property
    def default(self) -> str | None:
        return None if self.is_needed else str(self.values[0])


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a checkpoint is made. `preset`: the scheme of every linear layer, in its format's word.

    By one of three: a module that rounds one weight (`write`), `modifiers` of llm-compressor, or a
    module that makes the whole checkpoint in its own way (`make`).
    """

    method: str  # `batchinfer quantize --method`
    meaning: str
    preset: str
    makes: str  # the name in `model.quantization` of what it makes
    #: Has `round_weight`, `uses_shared_scale`, `group_size_of` and `settings_of`, each of which
    #: takes the preset.
    write: str | None = None
    make: str | None = None  # has `make(order, reporter)`, see making/order.py
    modifier: str | None = None  # what learns from calibration texts, in words or llm-compressor's
    #: Classes of llm-compressor that do it in turn, "module:Class"; the last gets the layers.
    modifiers: tuple[str, ...] = ()
    texts: Literal["none", "optional", "needed"] = "none"  # for calibration
    options: tuple[Option, ...] = ()  # for `make`
    #: Of models in the format of the method's authors, which are only rewritten: their key in
    #: config.json, and the module with `convert(source, target, on_progress)`.
    converts: str | None = None
    convert: str | None = None
    cpu_preset: str | None = None  # where the device is a CPU
    file_name: str | None = None  # of the one file that `make` writes; None: a folder
    is_continued: bool = False  # what `make` has finished is kept, and resumed
    revision: int = 1  # another one makes other numbers: what was made by this one is not taken

    def on(self, machine: Machine) -> Recipe:
        """The recipe of checkpoints that this machine can run."""
        if self.cpu_preset and machine.device == "cpu":
            return replace(self, preset=self.cpu_preset)
        return self

    @property
    def result(self) -> str:
        """For people: what it makes, in its format's word."""
        return f"{self.preset}{', weights only' if self.preset.endswith('A16') else ''}"

    @property
    def identity(self) -> str:
        """What decides the numbers, besides the model. Part of digests of jobs and caches."""
        return f"{self.method}: {self.preset} by {self.modifier or 'rounding'}, {self.revision}"


@dataclass(frozen=True, slots=True)
class Plugin:
    """A method's own code in an engine's processes: ours and those of its workers."""

    name: str  # the engine's `quantization`
    module: str  # registers itself with the engine when it is imported
    arguments: Mapping[str, Any] = field(default_factory=dict)  # further ones of the engine


def _the_family(family: str, settings: Settings) -> str:
    return family


def _no_act_order(settings: Settings) -> bool:
    return False


def _no_family(settings: Settings) -> str:
    return ""


def _not_cache_only(family: str, settings: Settings) -> bool:
    return False


def _cache_unsaid(family: str, settings: Settings) -> str:
    return "auto"


def _as_stored(loading: Loading, name: str, tensor: Tensor) -> int:
    return tensor.num_bytes


#: In the names of tensors that say how others are stored, and of buffers.
_NO_WEIGHTS = (
    "scale", "zero", "g_idx", "absmax", "quant_map", "quant_state", "scb", "weight_format",
    "weight_shape", "inv_freq", "masked_bias",
)  # fmt: skip


def count_weights(settings: Settings, module: str, parts: Mapping[str, Tensor]) -> int:
    """Weights of a module whose tensors are `parts`, by the rest of their names.

    A number each, but two in a byte without sign: packed 4-bit floats. Integers of 32 bits say
    nothing by themselves; methods that pack into them count for themselves.
    """
    return sum(_count(name.lower(), tensor) for name, tensor in parts.items())


def _count(name: str, tensor: Tensor) -> int:
    if any(word in name for word in _NO_WEIGHTS) or tensor.dtype in ("I64", "I32", "BOOL"):
        return 0
    return math.prod(tensor.shape) * (2 if tensor.dtype == "U8" else 1)


def _nothing(scheme: str, dtype_bytes: int) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Method:
    """One method. Its functions are pure; a KeyError of theirs names a setting that is missing."""

    name: str
    schemes: Mapping[str, str] = field(default_factory=dict)  # those it names -> for people
    names: tuple[Quantization, ...] = ()  # of `model.quantization`
    #: `quant_method` in config.json, in lower case; patterns as in file names.
    families: tuple[str, ...] = ()
    #: (family, settings) -> a scheme of any method, or words for one that is unknown.
    scheme_of: Callable[[str, Settings], str] = _the_family
    #: Of settings without a `quant_method` the family, if they are this method's; else "".
    unnamed_family: Callable[[Settings], str] = _no_family
    #: (family or "", settings) -> whether they say how the KV cache is kept and no more.
    is_cache_only: Callable[[str, Settings], bool] = _not_cache_only
    #: (family or "", settings) -> the name of `model.kv_cache_dtype` that engines read in them.
    kv_cache_of: Callable[[str, Settings], str] = _cache_unsaid
    has_act_order: Callable[[Settings], bool] = _no_act_order
    number_keys: tuple[str, ...] = ()  # settings that must be numbers or truths, not texts
    #: Where its settings are if not as `quantization_config` in config.json: below this key
    #: there, which is then the family; or as `quantization` in this file beside it.
    settings_key: str = ""
    settings_file: str = ""
    #: A file of settings that engines do not read -> the `quant_method` to put them in config.json
    #: with.
    unread_files: Mapping[str, str] = field(default_factory=dict)
    #: Last parts of the names of its stored tensors, as regular expressions: of what is a quantized
    #: weight with others, besides `weight...`; and of what some layers have and others need not.
    weight_parts: tuple[str, ...] = ()
    optional_parts: tuple[str, ...] = ()
    #: Of the schemes it names: raises ConfigError if the tensors are not what the settings say.
    check_stored: Callable[[Stored], None] = check_packed
    #: (what is loaded, tensor's name, tensor of a packed layer) -> its bytes once loaded.
    loaded_bytes: Callable[[Loading, str, Tensor], int] = _as_stored
    #: Of codes that a CPU decodes while it loads them, unless they are to stay packed: (the CPU's
    #: flags) -> why it could not compute with those; None: it can.
    why_not_packed: Callable[[frozenset[str]], str | None] | None = None
    #: (scheme, bytes of a number of the model's dtype) -> bytes that a step holds of each weight
    #: of one layer, dequantized.
    step_bytes_per_weight: Callable[[str, int], int] = _nothing
    #: (settings, module, its tensors by the rest of their names) -> the weights that they hold.
    count_weights: Callable[[Settings, str, Mapping[str, Tensor]], int] = count_weights
    #: Word in a folder's name -> schemes that its files can then have. Of several methods: any.
    hints: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    format_hints: tuple[str, ...] = ()  # those that name this very format of files
    recipes: tuple[Recipe, ...] = ()
    vllm: Plugin | None = None  # for that engine
