"""Where a command's job comes from: a job file, options, or a file and options that override it.

Every command that takes a job takes it so. Must not know: what a command does with it. Nothing
heavy is imported here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from batchinfer.errors import ConfigError

if TYPE_CHECKING:
    from batchinfer.config import Fixed, LoadedJob

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class JobOption:
    """An option that says what a setting says. `make`: what is set, of what is given."""

    name: str  # "--model"
    key: str  # "model.path"
    metavar: str
    help: str
    is_multiple: bool = False
    type: click.ParamType[Any] | None = None
    make: Callable[[Any], Any] = lambda given: given

    @property
    def parameter(self) -> str:
        return "job_" + self.name.removeprefix("--").replace("-", "_")

    def words(self, value: Any) -> list[str]:
        """As they are typed to give it."""
        values = value if self.is_multiple else [value]
        return [word for one in values for word in (self.name, str(one))]

    def __call__(self, command: _F) -> _F:
        return click.option(
            self.name,
            self.parameter,
            metavar=self.metavar,
            multiple=self.is_multiple,
            type=self.type,
            help=self.help,
        )(command)


def _user_says(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


#: What a job cannot do without, in the order in which `--help` shows it.
JOB_OPTIONS = (
    JobOption(
        "--input",
        "input.path",
        "PATH",
        "Parquet input: a glob in quotes, a folder or a file. Repeatable.",
        is_multiple=True,
        make=lambda paths: paths[0] if len(paths) == 1 else list(paths),
    ),
    JobOption("--model", "model.path", "MODEL", "Model folder or hub name."),
    JobOption(
        "--prompt-column", "prompt.column", "NAME", "Column whose text is the prompt, unchanged."
    ),
    JobOption(
        "--message",
        "prompt.messages",
        "TEXT",
        "What the user says to a chat model; {{ NAME }} stands for a column.",
        make=_user_says,
    ),
    JobOption("--output", "output.path", "PATH", "Folder of the results; local or s3://."),
)


#: What `init` asks besides.
MORE_OPTIONS = (
    JobOption("--task", "task", "NAME", "generate or score."),
    JobOption("--quantization", "model.quantization", "NAME", "As `batchinfer doctor` lists them."),
    JobOption("--max-tokens", "sampling.max_tokens", "N", "Of an answer.", type=click.INT),
    JobOption("--id-column", "input.id_column", "NAME", "Column with the row's id."),
)


NEEDED = (
    "give --input, --model, --output and either --prompt-column or --message; everything else by "
    "--set KEY=VALUE"
)
#: The same for `try`, which reads no row if it is given a prompt, and writes nothing.
NEEDED_TO_TRY = (
    "give --model and --prompt TEXT, or --model, --input and either --prompt-column or --message; "
    "everything else by --set KEY=VALUE"
)


@dataclass(frozen=True, slots=True)
class JobSource:
    """`path` None: without a job file. `given`: (option, value) of those that were given.

    `sets_name`: what messages call `sets`. `needed`: what is to be given without a file.
    """

    path: str | None
    sets: tuple[str, ...]
    given: tuple[tuple[JobOption, Any], ...] = ()
    sets_name: str = "--set"
    needed: str = NEEDED

    @property
    def title(self) -> str:
        """What people call it."""
        return self.path if self.path is not None else "the job of these options"

    def says(self, section: str) -> bool:
        """Whether an option or --set says something of a section."""
        return any(key.partition(".")[0] == section for key in self._keys())

    def said_of(self, section: str) -> frozenset[str]:
        """Keys of a section that an option, --set or a variable says; "" for the section itself."""
        from batchinfer.config.overrides import ENVIRONMENT_PREFIX

        variables = (
            name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
            for name in os.environ
            if name.startswith(ENVIRONMENT_PREFIX)
        )
        pairs = (key.partition(".") for key in (*self._keys(), *variables))
        return frozenset(inner.partition(".")[0] for outer, _, inner in pairs if outer == section)

    def _keys(self) -> list[str]:
        keys = [option.key for option, _ in self.given]
        return keys + [text.partition("=")[0].strip() for text in self.sets]

    def load(
        self,
        otherwise: Mapping[str, Any] | None = None,
        fixed: Fixed | None = None,
    ) -> LoadedJob:
        """`otherwise`: what a job without a file says where nothing else does. Its engine is that
        which its model needs. `fixed`: what nothing else may say.

        Raises ConfigError naming every problem.
        """
        from batchinfer.config import COMMAND_LINE, Override, load_job

        overrides = [
            Override.of_option(option.key, option.make(value), option.name)
            for option, value in self.given
        ]
        if self.path is None and (engine := self._engine()) is not None:
            otherwise = {**(otherwise or {}), "engine": {"name": engine}}
        try:
            return load_job(
                self.path,
                self.sets,
                sets_name=self.sets_name,
                options=overrides,
                otherwise=otherwise,
                fixed=fixed,
            )
        except ConfigError as error:
            if f"{COMMAND_LINE}: " in str(error):  # something is missing
                error.args = (f"{error}\nNote: without a job file, {self.needed}",)
            raise

    def _engine(self) -> str | None:
        from batchinfer.cli.engines import engine_for

        model = next((value for option, value in self.given if option.key == "model.path"), None)
        return None if not model or self.says("engine") else engine_for(model)


def job_argument(command: Callable[..., None], needed: str = NEEDED) -> Callable[..., None]:
    """What `command` gets as `source`, a `JobSource`. `needed`: see there."""

    @wraps(command)
    def with_source(*, job: str | None, sets: tuple[str, ...], **others: Any) -> None:
        command(source=source_of(job, sets, others, needed), **others)

    argument = click.argument("job", required=False, type=click.Path(dir_okay=False))
    return argument(setting_options(with_source, JOB_OPTIONS))


def setting_options(
    command: Callable[..., None], options: Sequence[JobOption]
) -> Callable[..., None]:
    """`command` with `options`, which `take` takes out of what it gets, and --set as `sets`."""
    decorated = click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a setting, such as --set sampling.max_tokens=64. Repeatable.",
    )(command)
    for option in reversed(options):
        decorated = option(decorated)
    return decorated


def source_of(
    job: str | None, sets: tuple[str, ...], parameters: dict[str, Any], needed: str = NEEDED
) -> JobSource:
    """Take the job's options out of `parameters`. Raises UsageError where nothing says a job."""
    given = take(parameters, JOB_OPTIONS)
    if job is None and not given:
        raise click.UsageError(f"Missing argument 'JOB'. Without a job file, {needed}")
    return JobSource(job, sets, given, needed=needed)


def take(
    parameters: dict[str, Any], options: Sequence[JobOption]
) -> tuple[tuple[JobOption, Any], ...]:
    """Those of `options` that were given, out of `parameters`."""
    values = [(option, parameters.pop(option.parameter)) for option in options]
    return tuple((option, value) for option, value in values if value not in (None, ()))
