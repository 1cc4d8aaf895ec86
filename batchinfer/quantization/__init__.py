"""Quantization by name: what a name means, what it needs, and what a checkpoint is.

`model.quantization` is a promise of the job file: the job runs in that quantization, or one
sentence says why not here and what to write instead. Three steps keep it, and all of them come
before a weight is read:

1. `detect` says what the checkpoint's files are (a *scheme*), as the method that knows their family
   reads the settings (`methods`: one folder for each).
2. `TABLE` has one record for each *name*: the schemes it stands for, and whether it also says what
   an unquantized model becomes. How an engine runs it on a device, and what that needs of hardware
   and packages, is in the engine's own table (`engine/NAME/support`), found by `Machine.engine`.
3. `choose` brings both together: a name that contradicts the files is refused; a name that this
   machine cannot run is refused with the reason, or replaced by the first of
   `model.quantization_fallback` that it can.

`model.kv_cache_dtype` is kept in the same way, by a table of names (`kv_cache`) and the engine's;
what `model.dtype: auto` means on a machine is in `dtypes`.

What really runs is counted by the engine once the model is loaded (`engine/vllm/layers`): a name
that quantized nothing ends the run, as several names of engines load and silently do nothing.

Doctor, explain, the table in the docs and the errors are made from the records and those tables, so
that none of them can say something else. Must not know: how the machine was examined (`Machine` is
plain values), whole model folders. Of engines it knows their names. Only modules that a method
names by their dotted names import torch, and nothing here imports those.
"""

from batchinfer.quantization.choose import (
    Choice,
    can_run,
    choose,
    describe_auto_dtype,
    for_this_machine,
    why_not,
)
from batchinfer.quantization.detect import (
    OTHER_FAMILIES,
    Checkpoint,
    detect,
    meant_by,
)
from batchinfer.quantization.dtypes import Begun, auto_dtype, lacks_arithmetic
from batchinfer.quantization.hints import check_hint
from batchinfer.quantization.kv_cache import (
    KV_CACHE_TABLE,
    choose_kv_cache,
    kv_cache_markdown,
    kv_cache_of,
    kv_cache_record,
    kv_cache_why_not,
)
from batchinfer.quantization.machine import CpuLibrary, Machine
from batchinfer.quantization.methods import (
    METHODS,
    Method,
    Option,
    Recipe,
    Stored,
    Tensor,
    method_of,
)
from batchinfer.quantization.methods.base import Loading, Quantization
from batchinfer.quantization.methods.gguf.files import (
    GgufFile,
    gguf_models,
    is_gguf,
    is_part,
    parts_of,
    read_gguf,
)
from batchinfer.quantization.support import (
    ALL_DTYPES,
    BFLOAT16_CAPABILITY,
    DeviceSupport,
    KvDevice,
    Support,
    support_of,
)
from batchinfer.quantization.table import (
    RECIPES,
    SCHEMES,
    TABLE,
    method_by_name,
    record_of,
)
from batchinfer.quantization.words import markdown_list

__all__ = [
    "ALL_DTYPES",
    "BFLOAT16_CAPABILITY",
    "KV_CACHE_TABLE",
    "METHODS",
    "OTHER_FAMILIES",
    "RECIPES",
    "SCHEMES",
    "TABLE",
    "Begun",
    "Checkpoint",
    "Choice",
    "CpuLibrary",
    "DeviceSupport",
    "GgufFile",
    "KvDevice",
    "Loading",
    "Machine",
    "Method",
    "Option",
    "Quantization",
    "Recipe",
    "Stored",
    "Support",
    "Tensor",
    "auto_dtype",
    "can_run",
    "check_hint",
    "choose",
    "choose_kv_cache",
    "describe_auto_dtype",
    "detect",
    "for_this_machine",
    "gguf_models",
    "is_gguf",
    "is_part",
    "kv_cache_markdown",
    "kv_cache_of",
    "kv_cache_record",
    "kv_cache_why_not",
    "lacks_arithmetic",
    "markdown_list",
    "meant_by",
    "method_by_name",
    "method_of",
    "parts_of",
    "read_gguf",
    "record_of",
    "support_of",
    "why_not",
]
