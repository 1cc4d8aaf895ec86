"""Text of Arrow columns that is not UTF-8: nobody checks what a file calls a string, and readers of
an output would refuse it whole.

Must not know: what the text is for.
"""

from __future__ import annotations

import pyarrow as pa

from batchinfer.source.casts import fixed_size_lists

_REPLACED = "replace"  # invalid bytes become U+FFFD


def with_valid_text(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, bool]:
    """The column with all its text in UTF-8, and whether something had to be replaced."""
    try:
        column.validate(full=True)
        return column, False
    except pa.ArrowInvalid:
        chunks = [_mended(chunk.take(pa.array(range(len(chunk))))) for chunk in column.chunks]
        return pa.chunked_array(chunks, column.type), True


def _mended(array: pa.Array) -> pa.Array:
    """`array` starts where its buffers start: it is not a slice."""
    types, kind = pa.types, array.type
    if types.is_string(kind):
        values = array.cast(pa.binary()).to_pylist()
        texts = [None if v is None else v.decode("utf-8", _REPLACED) for v in values]
        return pa.array(texts, kind)
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, _mended(array.storage))
    is_null = array.is_null()
    if types.is_list(kind):
        values = _mended(array.values)
        return pa.ListArray.from_arrays(array.offsets, values, type=kind, mask=is_null)
    if types.is_fixed_size_list(kind):
        values = _mended(array.values)
        return fixed_size_lists(values, kind, is_null)
    if types.is_struct(kind):
        fields = [_mended(array.field(index)) for index in range(kind.num_fields)]
        return pa.StructArray.from_arrays(fields, fields=list(kind), mask=is_null)
    if types.is_map(kind):
        keys, items = _mended(array.keys), _mended(array.items)
        return pa.MapArray.from_arrays(array.offsets, keys, items, type=kind, mask=is_null)
    return array
