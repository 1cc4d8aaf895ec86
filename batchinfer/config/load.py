"""YAML + environment + --set -> Job, and where each value came from.

Precedence: --set a.b=value > options of a command > environment BATCHINFER__A__B > YAML > defaults.
Without a job file there is no YAML, and the rest has to say all. Must not know:
engines, what is in data files. Invariants: nothing unknown is ignored, and one ConfigError names
every problem found, one a line, each with its place.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from batchinfer.config.job import Job
from batchinfer.config.job_file import read_document
from batchinfer.config.overrides import Override, from_environment, from_sets
from batchinfer.config.problems import (
    submodel,
    translate,
)
from batchinfer.config.yaml12 import MAX_DEPTH, Document
from batchinfer.errors import ConfigError

logger = logging.getLogger("batchinfer.config")

SET_OPTION = "--set"
#: Where a job without a file comes from.
COMMAND_LINE = "command line"
_S = TypeVar("_S", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class LoadedJob:
    """A job and each setting's origin: "jobs/x.yaml:7", "--set", "overrides", an option, a
    variable's name or "default".
    """

    job: Job
    origins: Mapping[str, str]  # dotted key -> origin
    settings: Mapping[str, Any]  # what a job file would have to say, in the models' order


@dataclass(frozen=True, slots=True)
class Fixed:
    """Sections and settings that a command says itself: no override may touch them."""

    keys: tuple[str, ...]
    without_bearing: tuple[str, ...]  # of them, what may be said all the same
    why: str


def load_job(
    path: str | os.PathLike[str] | None,
    sets: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    *,
    sets_name: str = SET_OPTION,
    options: Sequence[Override] = (),
    otherwise: Mapping[str, Any] | None = None,
    fixed: Fixed | None = None,
) -> LoadedJob:
    """Load the job file at `path` with its overrides. `environ` None: this process's environment.

    `path` None: the overrides say all, and the job is named after its output. `sets_name`: what
    messages call `sets`. `options`: what a command's own options say. `otherwise`: sections and
    settings of a job without a file where nothing else says them. `fixed`: what of
    that no override may touch. Raises ConfigError naming every problem.
    """
    environ = os.environ if environ is None else environ
    name = COMMAND_LINE if path is None else os.fspath(path)
    without_file = {"version": 1, **_copied(otherwise or {})}
    document = Document(without_file) if path is None else read_document(name)
    return _load(document, sets, environ, name, sets_name, options, fixed)


def job_from(
    data: Mapping[str, Any], sets: Sequence[str] = (), *, sets_name: str = SET_OPTION
) -> Job:
    """The job that a mapping describes as a job file does. The environment is not looked at.

    `sets_name`: what messages call `sets`. Raises ConfigError naming every problem.
    """
    document = Document(data=_copied(data))
    return _load(document, sets, {}, "job", sets_name).job


def _copied(value: Any, depth: int = 0) -> Any:
    """Mappings are copied, as overrides change them. What is too deep is refused later."""
    if not isinstance(value, Mapping) or depth > MAX_DEPTH:
        return value
    return {key: _copied(entry, depth + 1) for key, entry in value.items()}


def _load(
    document: Document,
    sets: Sequence[str],
    environ: Mapping[str, str],
    name: str,
    sets_name: str,
    options: Sequence[Override] = (),
    fixed: Fixed | None = None,
) -> LoadedJob:
    problems = list(document.problems)
    origins = {key: f"{name}:{line}" for key, line in document.lines.items()}
    overrides = [*from_environment(environ, problems), *options]
    overrides += from_sets(sets, sets_name, problems)
    if fixed is not None and (refused := [t for one in overrides for t in _refused(one, fixed)]):
        raise ConfigError("\n".join(refused))
    data: dict[str, Any] = document.data
    applied = [override for override in overrides if _apply(data, override, origins, problems)]
    if name == COMMAND_LINE and "name" not in data:
        output = data.get("output")
        data["name"] = name_of(output.get("path") if isinstance(output, dict) else None)
    if unusable := [_placed(key, sentence, origins, name) for key, sentence in _unusable(data, "")]:
        raise ConfigError("\n".join([*problems, *unusable]))
    try:
        job = _validate(data, applied)
    except ValidationError as error:
        problems += (_placed(key, sentence, origins, name) for key, sentence in translate(error))
        raise ConfigError("\n".join(problems)) from None
    if problems:
        raise ConfigError("\n".join(problems))
    leaves = {key: origins.get(key, "default") for key, _ in _leaves(job)}
    return LoadedJob(job, MappingProxyType(leaves), _in_order(data, Job))


def load_section(path: str | os.PathLike[str], model: type[_S], what: str) -> _S:
    """A file other than a job, as strictly as a job file. `what` it is, such as "spec".

    Neither the environment nor options override it. JSON may be indented with tabs, as YAML may
    not. Raises ConfigError naming every problem with its line.
    """
    name = os.fspath(path)
    document = read_document(name, what)
    origins = {key: f"{name}:{line}" for key, line in document.lines.items()}
    problems = list(document.problems)
    problems += (_placed(key, why, origins, name) for key, why in _unusable(document.data, ""))
    try:
        section = model.model_validate(document.data)
    except ValidationError as error:
        problems += (_placed(key, why, origins, name) for key, why in translate(error, model))
        section = None
    if section is None or problems:
        raise ConfigError("\n".join(problems))
    return section


def explain(loaded: LoadedJob) -> list[tuple[str, str, str]]:
    """(dotted key, value as one line of JSON, origin) for every setting, in the models' order."""
    own = {f"sampling.{name}": c for name, c in loaded.job.sampling.per_row.columns.items()}
    return [
        (
            key,
            json.dumps(value, ensure_ascii=False),
            loaded.origins[key] + (f"; a row's own from column {own[key]}" if key in own else ""),
        )
        for key, value in _leaves(loaded.job)
    ]


def name_of(path: object) -> str:
    """A name for a job, after the last part of a path, as far as it can be."""
    last = str(path or "").rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("._-")[:64] or "job"


def _in_order(settings: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Sections and settings in the order in which `model` declares them."""
    ordered = {}
    for name in model.model_fields:
        if name in settings:
            value, inner = settings[name], _section_model(model, name)
            if inner is not None and isinstance(value, dict):
                value = _in_order(value, inner)
            ordered[name] = value
    return ordered


def _apply(
    data: dict[str, Any], override: Override, origins: dict[str, str], problems: list[str]
) -> bool:
    """Put the value in its place. A mapping for a section changes the keys it has, no others."""
    section = data
    model: type[BaseModel] | None = Job
    for depth, part in enumerate(override.key[:-1], start=1):
        if section.get(part) is None:
            section[part] = {}
        if not isinstance(section[part], dict):
            parent = ".".join(override.key[:depth])
            problems.append(
                f"{override.origin}: {'.'.join(override.key)}: {parent} is not a mapping; set it "
                "as a whole (as JSON)"
            )
            return False
        section = section[part]
        model = _section_model(model, part)
    for key, at, value in _places(section, override.key, override.value, model):
        at[key[-1]] = value
        dotted = ".".join(key)
        for below in [known for known in origins if known.startswith(f"{dotted}.")]:
            del origins[below]
        origins.update({written: override.origin for written in _keys(value, dotted)})
    return True


def _refused(override: Override, fixed: Fixed) -> Iterator[str]:
    """Why an override must not be, whether it says a setting, one below it or all around it."""
    for said, value in _with_values(override.value, ".".join(override.key)):
        if any(_is_within(said, key) for key in fixed.without_bearing):
            continue
        is_around = not isinstance(value, dict) and any(_is_within(k, said) for k in fixed.keys)
        if is_around or any(_is_within(said, key) for key in fixed.keys):
            yield f"{override.origin}: {said}: {fixed.why}"


def _is_within(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def _with_values(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Settings, and sections that are not mappings, with their values."""
    if isinstance(value, dict) and value:
        for name, below in value.items():
            yield from _with_values(below, f"{key}.{name}")
    else:
        yield key, value


def _places(
    section: dict[str, Any], key: tuple[str, ...], value: Any, model: type[BaseModel] | None
) -> Iterator[tuple[tuple[str, ...], dict[str, Any], Any]]:
    """(key, mapping it goes into, value) of each setting. `section` is what `model` describes.

    A free mapping (engine.options, a JSON schema) is one setting, and replaced as a whole.
    """
    inner = _section_model(model, key[-1])
    old = section.get(key[-1])
    if inner is None or not isinstance(value, dict) or not isinstance(old, dict):
        yield key, section, value
        return
    for name, below in value.items():
        yield from _places(old, (*key, name), below, inner)


def _section_model(model: type[BaseModel] | None, name: str) -> type[BaseModel] | None:
    """The model of a section of `model`; None: `name` is a setting, or unknown."""
    if model is None or name not in model.model_fields:
        return None
    return submodel(model.model_fields[name].annotation)


def _unusable(value: Any, key: str, depth: int = 0) -> Iterator[tuple[str, str]]:
    """(dotted key, sentence) of what no setting may hold, whatever it means."""
    if depth > MAX_DEPTH:
        yield key, f"values in values more than {MAX_DEPTH} deep"
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:  # "\\ud800", or bytes of the command line
            yield key, f"is not valid text: {error.reason} (character {error.start + 1})"
    elif isinstance(value, dict):
        for name, below in value.items():
            yield from _unusable(name, key)
            yield from _unusable(below, f"{key}.{name}" if key else name, depth + 1)
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from _unusable(below, f"{key}.{index}", depth + 1)


def _keys(value: Any, key: str) -> Iterator[str]:
    """`key` and the keys of the mappings below it."""
    yield key
    if isinstance(value, dict):
        for name, below in value.items():
            yield from _keys(below, f"{key}.{name}")


def _validate(data: dict[str, Any], overrides: Sequence[Override]) -> Job:
    """Build the job. A number in an override is text where text is wanted (a revision)."""
    try:
        return Job.model_validate(data)
    except ValidationError as error:
        text_wanted = {
            tuple(map(str, details["loc"]))
            for details in error.errors(include_url=False)
            if details["type"] in ("string_type", "tuple_type")
        }
        mistaken = [
            override
            for override in overrides
            if override.key in text_wanted and isinstance(override.value, int | float)
        ]
        if not mistaken:
            raise
    for override in mistaken:
        section = data
        for part in override.key[:-1]:
            section = section[part]
        section[override.key[-1]] = override.text
    return Job.model_validate(data)


def _placed(key: str, sentence: str, origins: Mapping[str, str], name: str) -> str:
    """The problem with the place where `key`, else the nearest section around it, was written."""
    parent, _, last = key.rpartition(".")
    if last.isdigit() and key not in origins:
        key = parent  # one text where a list may be: the user wrote no index
    written = key
    while written and written not in origins:
        written = written.rpartition(".")[0]
    origin = origins[written] if written else name
    return f"{origin}: {key}: {sentence}" if key else f"{origin}: {sentence}"


def _leaves(job: Job) -> Iterator[tuple[str, Any]]:
    """Every setting with its plain value; a free mapping is split into its keys, a list is not."""

    def walk(
        model: type[BaseModel] | None, values: Mapping[str, Any], prefix: str
    ) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if model is not None and isinstance(value, dict) and value:
                inner = submodel(model.model_fields[name].annotation)
                yield from walk(inner, value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return walk(Job, job.model_dump(mode="json"), "")
