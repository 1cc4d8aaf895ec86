"""Columns in other types, also where Arrow's own cast makes invalid arrays: of list views, whose
last end it forgets, and of nulls inside of lists, structs and maps, whose length it changes.

Must not know: why another type is wanted.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def cast_column(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray:
    """The same values in another type, at any depth."""
    if column.type == wanted:
        return column
    if not _is_cast_wrong(column.type):
        return column.cast(wanted)
    return pa.chunked_array([_cast(chunk, wanted) for chunk in column.chunks], wanted)


def cast_table(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of `schema`, which are those of the table in other types."""
    columns = [cast_column(table.column(field.name), field.type) for field in schema]
    return pa.table(columns, schema=schema)


def fixed_size_lists(
    values: pa.Array, kind: pa.FixedSizeListType, is_null: pa.BooleanArray
) -> pa.FixedSizeListArray:
    """Lists of the values in order, those of null lists among them.

    Arrow finds their number by a division that ends the process for lists of size 0.
    """
    if kind.list_size:
        return pa.FixedSizeListArray.from_arrays(values, type=kind, mask=is_null)
    valid = pc.invert(is_null).buffers()[1]
    return pa.Array.from_buffers(kind, len(is_null), [valid], children=[values])


def _is_cast_wrong(data_type: pa.DataType) -> bool:
    types = pa.types
    if types.is_list_view(data_type) or types.is_large_list_view(data_type):
        return True
    if isinstance(data_type, pa.BaseExtensionType):
        return _is_cast_wrong(data_type.storage_type)
    if types.is_dictionary(data_type):
        return _is_cast_wrong(data_type.value_type)
    inner = [data_type.field(index).type for index in range(data_type.num_fields)]
    return any(types.is_null(kind) or _is_cast_wrong(kind) for kind in inner)


def _cast(array: pa.Array, wanted: pa.DataType) -> pa.Array:
    types, kind = pa.types, array.type
    if kind == wanted:
        return array
    if types.is_null(kind):
        return pa.nulls(len(array), wanted)
    if isinstance(wanted, pa.BaseExtensionType):
        storage = array.storage if isinstance(kind, pa.BaseExtensionType) else array
        return pa.ExtensionArray.from_storage(wanted, _cast(storage, wanted.storage_type))
    if isinstance(kind, pa.BaseExtensionType):
        return _cast(array.storage, wanted)
    if types.is_dictionary(kind):
        return _cast(array.dictionary_decode(), wanted)
    if not types.is_nested(wanted):
        return array.cast(wanted)
    is_null = array.is_null()
    if types.is_struct(wanted):
        return pa.StructArray.from_arrays(
            _cast_fields(array, wanted), fields=list(wanted), mask=is_null
        )
    if types.is_fixed_size_list(wanted):
        size = wanted.list_size
        values = _cast(
            array.values.slice(array.offset * size, len(array) * size), wanted.value_type
        )
        return fixed_size_lists(values, wanted, is_null)
    entries = _cast_map_to_list(array) if types.is_map(kind) else array
    lengths = pc.fill_null(pc.list_value_length(entries), 0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    values = entries.flatten()  # without what null lists have
    if not types.is_map(wanted):
        values = _cast(values, wanted.value_type)
        return pa.ListArray.from_arrays(offsets, values, type=wanted, mask=is_null)
    keys, items = values.flatten()
    keys, items = _cast(keys, wanted.key_type), _cast(items, wanted.item_type)
    return pa.MapArray.from_arrays(offsets, keys, items, type=wanted, mask=is_null)


def _cast_fields(array: pa.StructArray, wanted: pa.StructType) -> list[pa.Array]:
    """By name; a field that the array has not is null."""
    of_array = dict(zip((field.name for field in array.type), array.flatten(), strict=True))
    return [
        _cast(of_array[field.name], field.type)
        if field.name in of_array
        else pa.nulls(len(array), field.type)
        for field in wanted
    ]


def _cast_map_to_list(array: pa.MapArray) -> pa.ListArray:
    kind = array.type.field(0).type
    entries = pa.StructArray.from_arrays([array.keys, array.items], fields=list(kind))
    offsets = pa.array(array.offsets.to_numpy(), pa.int32())  # no slice: it could have no mask
    return pa.ListArray.from_arrays(offsets, entries, mask=array.is_null())
