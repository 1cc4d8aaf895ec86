"""--set and environment variables: texts for keys of a job, held against the settings there are.

Must not know: the job file, what values a setting takes.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from batchinfer.config.job import Job
from batchinfer.config.problems import (
    given_twice,
    nearest_keys,
    settings,
    submodel,
    unknown_key,
)
from batchinfer.config.values import shown

logger = logging.getLogger("batchinfer.config")

ENVIRONMENT_PREFIX = "BATCHINFER__"
#: What other packages read, each with a name of its own.
_OTHER_VARIABLES = frozenset(
    {
        "BATCHINFER_DEBUG",
        "BATCHINFER_ENGINE_OWNER_PID",
        "BATCHINFER_ENGINE_PLUGINS",
        "BATCHINFER_KEEP_PACKED",
        "BATCHINFER_KERNELS",
    }
)
#: It gives each pod such variables for a service of our name.
_OF_KUBERNETES = re.compile(r"_(SERVICE_HOST|SERVICE_PORT\w*|PORT|PORT_\d+_\w+)$")


@dataclass(frozen=True, slots=True)
class Override:
    key: tuple[str, ...]
    text: str
    origin: str  # "--set", "overrides", an option or the variable's name

    @classmethod
    def of_option(cls, key: str, value: Any, option: str) -> Override:
        """What a command's own option says of a setting. `value`: JSON data, as it is meant."""
        return cls(tuple(key.split(".")), json.dumps(value), option)

    @property
    def value(self) -> Any:
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError):
            return self.text

    def spell(self, key: str, depth: int) -> str:
        """`key`, meant by the part at `depth`, as the user writes it, with the parts after it."""
        whole = ".".join([key, *self.key[depth + 1 :]])
        key = whole if whole in settings() else key
        return variable_of(key) if self.is_variable else key

    @property
    def is_variable(self) -> bool:
        return self.origin.startswith(ENVIRONMENT_PREFIX)


def from_environment(environ: Mapping[str, str], problems: list[str]) -> Iterator[Override]:
    for variable in sorted(environ):
        _warn_of_misspelt(variable)
        if variable.startswith(ENVIRONMENT_PREFIX):
            key = tuple(variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__"))
            override = Override(key, environ[variable], variable)
            if _is_known(override, problems):
                yield override


def _warn_of_misspelt(variable: str) -> None:
    """One with our name that sets nothing: mostly an underscore is missing."""
    is_ours = variable.startswith("BATCHINFER_") and not variable.startswith(ENVIRONMENT_PREFIX)
    if not is_ours or variable in _OTHER_VARIABLES or _OF_KUBERNETES.search(variable):
        return
    spelt = {variable_of(key).replace("__", "_"): variable_of(key) for key in settings()}
    meant = difflib.get_close_matches(variable.replace("__", "_"), spelt, n=1)
    logger.warning(
        "the environment variable %s sets nothing: that of a setting is %sSECTION__KEY%s",
        *(variable, ENVIRONMENT_PREFIX),
        f" (did you mean {spelt[meant[0]]}?)" if meant else "",
    )


def from_sets(sets: Iterable[str], origin: str, problems: list[str]) -> Iterator[Override]:
    for assignment in sets:
        key, equals, text = assignment.partition("=")
        if not equals:
            problems.append(f"{origin} {shown(assignment)}: must look like section.key=value")
            continue
        override = Override(tuple(key.strip().split(".")), text, origin)
        if _is_known(override, problems):
            yield override


def _is_known(override: Override, problems: list[str]) -> bool:
    """Whether the key exists in the models; below a free mapping (engine.options) any key does."""
    if (twice := given_twice(override.text)) is not None:
        problems.append(f"{override.origin}: {'.'.join(override.key)}: {twice}: given twice")
        return False
    model: type[BaseModel] = Job
    for depth, part in enumerate(override.key):
        field = model.model_fields.get(part)
        if field is None:
            near = nearest_keys(model, ".".join(override.key[:depth]), part)
            sentence = unknown_key(model, [override.spell(key, depth) for key in near])
            key = ".".join(override.key)
            place = override.origin if override.is_variable else f"{override.origin} {key}"
            problems.append(f"{place}: {sentence}")
            return False
        inner = submodel(field.annotation)
        if inner is None:
            return True
        model = inner
    return True


def variable_of(key: str) -> str:
    return ENVIRONMENT_PREFIX + key.upper().replace(".", "__")
