"""Kinds of values that job settings share: text lists, frozen JSON mappings, locations.

Must not know: which setting uses them. Invariant: what comes out is immutable, is JSON data and
holds no credentials; a message never repeats a secret that it refuses.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import (
    AfterValidator,
    BeforeValidator,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
)

#: Counts of rows, tokens and the like: what 32 bits hold, as engines do.
MAX_COUNT = 2**31 - 1


class FrozenDict(dict[str, Any]):
    """A dict that cannot change. Still a dict, so that json, pickle and libraries take it."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("a job cannot be changed; create another one")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (dict(self),)


def freeze(value: object) -> object:
    """An immutable copy of JSON data. Raises ValueError for what JSON cannot hold."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list | tuple):
        return tuple(freeze(entry) for entry in value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return FrozenDict({key: freeze(entry) for key, entry in value.items()})
    raise ValueError(f"must hold only what JSON can express, got {shown(value)}")


def thaw(value: Any) -> Any:
    """A plain, mutable copy of what `freeze` made: dicts and lists again."""
    if isinstance(value, Mapping):
        return {key: thaw(entry) for key, entry in value.items()}
    return [thaw(entry) for entry in value] if isinstance(value, list | tuple) else value


def shown(value: object, max_chars: int = 80) -> str:
    """`value` as it looks in a YAML or JSON file, shortened, without credentials in URLs."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    # A secret key may hold slashes, so everything up to the last @ goes.
    text = re.sub(r"://[^\s\"']*@", "://***@", text)
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


def _frozen_mapping(value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a mapping (keys with values), got {shown(value)}")
    frozen = freeze(value)
    assert isinstance(frozen, FrozenDict)
    return frozen


def _named_paths(value: object) -> Mapping[str, str]:
    """Names -> folders or hub names."""
    named = _frozen_mapping(value)
    for name, path in named.items():
        _slug(name)
        if not isinstance(path, str):
            raise ValueError(f"{name}: must be a folder or a hub name, got {shown(path)}")
        try:
            _local_or_hub(path)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return named


def _list_to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _one_or_more_to_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else _list_to_tuple(value)


def _non_empty(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    return value


def _path(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain NUL characters")
    if value.startswith("~"):
        try:
            Path(value).expanduser()
        except RuntimeError:
            raise ValueError(f"{value.partition('/')[0]} is not a known home folder") from None
    _non_empty(value.strip())  # a folder of blanks is a variable that was not set
    return value


def _distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"lists {', '.join(map(shown, twice))} more than once")
    return values


def _location(value: str) -> str:
    """A local path or s3://bucket/…; raises ValueError for anything else."""
    scheme, separator, rest = value.partition("://")
    if not separator:
        if value.startswith("s3:"):
            raise ValueError("must start with s3:// (two slashes) to mean S3")
        return _path(value)
    bucket = rest.partition("/")[0]
    # A secret may hold slashes, so "key:secret@bucket" need not show its @ before the first slash.
    if "@" in scheme + bucket or (":" in bucket and not bucket.startswith("arn:")):
        raise ValueError(
            "must not contain credentials; give them by the environment (AWS_ACCESS_KEY_ID, …) or "
            "name a profile in the s3 section"
        )
    if scheme != "s3":
        raise ValueError(f"must be a local path or s3://bucket/…; {scheme}:// is not supported")
    if not bucket:
        raise ValueError("names no bucket; write s3://bucket/…")
    return value


def _fixed_location(value: str) -> str:
    if "*" in value or "?" in value:
        raise ValueError("must be one folder, not a pattern with * or ?")
    return _location(value)


def _local_or_hub(value: str) -> str:
    if "://" in value:
        scheme = value.partition("://")[0]
        raise ValueError(f"must be a folder or a hub name; {scheme}:// is not supported here")
    return _path(value)


def _endpoint(value: str) -> str:
    if "@" in value:
        raise ValueError("must not contain credentials; give them by the environment or a profile")
    if not re.fullmatch(r"https?://[^/?#\s]+/?", value):
        raise ValueError("must look like http://host:port or https://host")
    return value.rstrip("/")


def _slug(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
        raise ValueError(
            "must be 1 to 64 letters, digits, dots, dashes or underscores and start with a letter "
            f"or digit, got {shown(value)}"
        )
    return value


def _positive_or_auto(value: object) -> int | str:
    if value == "auto" and isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_COUNT:
        return value
    bound = f"at most {MAX_COUNT}" if _is_above(value) else "at least 1"
    raise ValueError(f"must be auto or a whole number of {bound}, got {shown(value)}")


def _is_above(value: object) -> bool:
    return isinstance(value, int) and value > MAX_COUNT


def _share_or_auto(value: object) -> float | str:
    if value == "auto" and isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
        return float(value)
    raise ValueError(f"must be auto or a number above 0 to 1, got {shown(value)}")


def _devices(value: object) -> int | str | tuple[int, ...]:
    if isinstance(value, list | tuple):
        indices = [n for n in value if isinstance(n, int) and not isinstance(n, bool) and n >= 0]
        if not value or len(indices) < len(value) or len(set(indices)) < len(value):
            raise ValueError(f"must list different indices of devices, got {shown(value)}")
        return tuple(indices)
    if isinstance(value, str | bool) and value != "auto":
        raise ValueError(f"must be auto, a number or a list of indices, got {shown(value)}")
    return _positive_or_auto(value)


_TEXT_SCHEMA = {"type": "string", "minLength": 1}
_TEXT_OR_LIST_SCHEMA = {"anyOf": [_TEXT_SCHEMA, {"type": "array", "items": _TEXT_SCHEMA}]}

Text = Annotated[str, AfterValidator(_non_empty), WithJsonSchema(_TEXT_SCHEMA)]
Slug = Annotated[str, AfterValidator(_slug)]
Location = Annotated[str, AfterValidator(_location)]
FixedLocation = Annotated[str, AfterValidator(_fixed_location)]
LocalOrHub = Annotated[str, AfterValidator(_local_or_hub)]
Endpoint = Annotated[str, AfterValidator(_endpoint)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_list_to_tuple), AfterValidator(_distinct)]
OneOrMoreTexts = Annotated[
    tuple[Text, ...],
    BeforeValidator(_one_or_more_to_tuple),
    AfterValidator(_distinct),
    WithJsonSchema(_TEXT_OR_LIST_SCHEMA),
]
OneOrMoreLocations = Annotated[
    tuple[Location, ...],
    BeforeValidator(_one_or_more_to_tuple),
    AfterValidator(_distinct),
    WithJsonSchema(_TEXT_OR_LIST_SCHEMA),
]
Tuple = BeforeValidator(_list_to_tuple)  # for Annotated[tuple[X, ...], Tuple]
PositiveOrAuto = Annotated[
    int | str,
    PlainValidator(_positive_or_auto),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1, "maximum": MAX_COUNT}, {"const": "auto"}]}
    ),
]
DevicesOrAuto = Annotated[
    int | str | tuple[int, ...],
    PlainValidator(_devices),
    PlainSerializer(thaw),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": MAX_COUNT},
                {"const": "auto"},
                {
                    "type": "array",
                    "items": {"type": "integer", "minimum": 0},
                    "minItems": 1,
                    "uniqueItems": True,
                },
            ]
        }
    ),
]
ShareOrAuto = Annotated[
    float | str,
    PlainValidator(_share_or_auto),
    WithJsonSchema(
        {"anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": 1}, {"const": "auto"}]}
    ),
]
NamedPaths = Annotated[
    Mapping[str, str],
    PlainValidator(_named_paths),
    PlainSerializer(thaw),
    WithJsonSchema({"type": "object", "additionalProperties": _TEXT_SCHEMA}),
]
FrozenMapping = Annotated[
    Mapping[str, Any],
    PlainValidator(_frozen_mapping),
    PlainSerializer(thaw),
    WithJsonSchema({"type": "object"}),
]
