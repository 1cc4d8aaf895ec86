"""Plain Arrow types: what a column means, without how its writer stored it.

pandas, polars and DuckDB write the same texts as string, large_string, string_view or dictionary;
shards of one input must still become one output schema. Numbers, times and structure stay.
"""

from __future__ import annotations

import pyarrow as pa

from batchinfer.source.casts import cast_column

_UUID = {b"batchinfer.type": b"uuid"}


def plain_type(data_type: pa.DataType) -> pa.DataType:
    """The type without dictionaries, views, large offsets and extensions, at any depth."""
    types = pa.types
    if types.is_dictionary(data_type):
        return plain_type(data_type.value_type)
    if isinstance(data_type, pa.BaseExtensionType):
        return plain_type(data_type.storage_type)
    if types.is_large_string(data_type) or types.is_string_view(data_type):
        return pa.string()
    if types.is_large_binary(data_type) or types.is_binary_view(data_type):
        return pa.binary()
    if (
        types.is_list(data_type)
        or types.is_large_list(data_type)
        or types.is_list_view(data_type)
        or types.is_large_list_view(data_type)
    ):
        return pa.list_(_plain_field(data_type.value_field))
    if types.is_fixed_size_list(data_type):
        return pa.list_(_plain_field(data_type.value_field), data_type.list_size)
    if types.is_map(data_type):
        key, item = _plain_field(data_type.key_field), _plain_field(data_type.item_field)
        return pa.map_(key, item, keys_sorted=data_type.keys_sorted)
    if types.is_struct(data_type):
        return pa.struct([_plain_field(field) for field in data_type])
    return data_type


def plain_field(name: str, data_type: pa.DataType) -> pa.Field:
    """A column in its plain type; that its bytes are UUIDs stays in its metadata."""
    is_uuid = isinstance(data_type, pa.UuidType)
    return pa.field(name, plain_type(data_type), metadata=_UUID if is_uuid else None)


def has_uuids(field: pa.Field) -> bool:
    """Whether the bytes of a plain column are UUIDs."""
    return bool(field.metadata == _UUID)


def plain_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The same values in their plain type."""
    if isinstance(column.type, pa.BaseExtensionType):
        storage = [chunk.storage for chunk in column.chunks]
        return plain_column(pa.chunked_array(storage, column.type.storage_type))
    return cast_column(column, plain_type(column.type))


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(plain_type(field.type))
