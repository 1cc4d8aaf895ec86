"""What is wrong with a job, as sentences: pydantic's errors translated, names near unknown keys.

Must not know: files, lines, environment variables. It speaks of dotted keys; `load` adds the place.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from batchinfer.config.job import Job
from batchinfer.config.values import shown

_SENTENCES = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "model_type": "must be a mapping (keys with values)",
    "tuple_type": "must be a list",
}


def given_twice(text: str) -> str | None:
    """The first key that a JSON mapping has twice; None if none has, or `text` is no JSON."""
    twice: list[str] = []

    def look(pairs: list[tuple[str, Any]]) -> None:
        keys = [key for key, _ in pairs]
        twice.extend(key for index, key in enumerate(keys) if key in keys[:index])

    try:
        json.loads(text, object_pairs_hook=look)
    except (ValueError, RecursionError):
        return None
    return twice[0] if twice else None


def submodel(annotation: Any, *, in_lists: bool = False) -> type[BaseModel] | None:
    """The settings model that a field holds, with `in_lists` also one that it holds a list of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is tuple and not in_lists:
        return None
    found = (submodel(part, in_lists=in_lists) for part in get_args(annotation))
    return next(filter(None, found), None)


def settings(model: type[BaseModel] = Job, prefix: str = "") -> Iterator[str]:
    """The dotted key of every setting that is not a section, in the order of the models."""
    for name, field in model.model_fields.items():
        inner = submodel(field.annotation)
        if inner is None:
            yield prefix + name
        else:
            yield from settings(inner, f"{prefix}{name}.")


def nearest_keys(
    model: type[BaseModel], parent: str, name: str, root: type[BaseModel] = Job
) -> list[str]:
    """The dotted keys that `name` may mean, a key that `model` (at dotted key `parent`) lacks."""
    elsewhere = list(settings(root))
    same_name = [key for key in elsewhere if key.rpartition(".")[2] == name.lower()]
    if same_name:  # not those of `sampling.per_row` where others are meant
        least = min(key.count(".") for key in same_name)
        return [key for key in same_name if key.count(".") == least]
    prefix = f"{parent}." if parent else ""
    siblings = difflib.get_close_matches(name.lower(), model.model_fields, n=1)
    if siblings:
        return [prefix + siblings[0]]
    deepest_first = sorted(elsewhere, key=lambda key: -key.count("."))  # the last one counts
    last_names = {key.rpartition(".")[2]: key for key in deepest_first}
    found = difflib.get_close_matches(name.lower(), last_names, n=1, cutoff=0.8)
    return [last_names[found[0]]] if found else []


def unknown_key(model: type[BaseModel], meant: Sequence[str]) -> str:
    """What to say about a key that `model` lacks. `meant`: candidates, as the user writes them."""
    if meant:
        return f"unknown key; did you mean {' or '.join(meant)}?"
    return f"unknown key; the keys here are {', '.join(model.model_fields)}"


def translate(error: ValidationError, root: type[BaseModel] = Job) -> Iterator[tuple[str, str]]:
    """(dotted key, sentence) for each problem of a `root`, in the order of the models."""
    all_details = error.errors(include_url=False)
    for details in all_details:
        loc = [str(part) for part in details["loc"]]
        context = details.get("ctx", {})
        kind = details["type"]
        depth = len(loc)
        if kind == "too_short" and any(
            other["loc"][:depth] == details["loc"] and len(other["loc"]) > depth
            for other in all_details
        ):
            continue  # pydantic does not count the entries that are wrong themselves
        if kind == "key_error":
            loc += context["key"].split(".")
        if kind == "extra_forbidden":
            yield ".".join(loc), _unknown(loc, root)
            continue
        yield ".".join(loc), _sentence(kind, details["input"], context, details["msg"])


def _unknown(loc: list[str], root: type[BaseModel]) -> str:
    model = _model_at(loc[:-1], root)
    return unknown_key(model, nearest_keys(model, ".".join(loc[:-1]), loc[-1], root))


def _sentence(kind: str, value: object, context: Mapping[str, Any], message: str) -> str:
    if kind == "missing":
        return "is missing"
    if kind == "key_error":
        return str(context["sentence"])
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return _not_a_choice(str(context["expected"]), value)
    if kind == "too_short":
        return "must not be empty"
    bounds = {
        name: int(bound) if isinstance(bound, float) and bound.is_integer() else bound
        for name, bound in context.items()
    }
    sentence = _SENTENCES[kind].format_map(bounds) if kind in _SENTENCES else message
    hint = "; put it in quotes" if kind == "string_type" and isinstance(value, int | float) else ""
    return f"{sentence}, got {shown(value)}{hint}"


def _not_a_choice(expected: str, value: object) -> str:
    """`expected` is pydantic's list: 'a', 'b' or 'c'."""
    choices = expected.replace("'", "").replace(" or ", ", ").split(", ")
    sentence = (
        f"must be {'' if len(choices) == 1 else 'one of '}{', '.join(choices)}, got {shown(value)}"
    )
    close = difflib.get_close_matches(str(value).lower(), choices, n=1)
    return f"{sentence}; did you mean {close[0]}?" if close else sentence


def _model_at(loc: list[str], root: type[BaseModel]) -> type[BaseModel]:
    model = root
    for part in loc:
        if part in model.model_fields:
            model = submodel(model.model_fields[part].annotation, in_lists=True) or model
    return model
