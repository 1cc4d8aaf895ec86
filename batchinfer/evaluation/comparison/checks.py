"""What refuses a whole comparison, before anything is computed.

That is whatever a spec says or names that cannot be: a text, folder, tokenizer or adapter that is
not there or cannot be read, a setting that no job has, a context longer than a model's. What is
wrong inside a model, and what does not run here, concerns that entry alone and is a row with its
error. Must not know: how anything is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from batchinfer.config import Job
from batchinfer.engine.kinds import check_demand, engine_kind
from batchinfer.errors import ConfigError, InputError
from batchinfer.evaluation.comparison.spec import Planned
from batchinfer.evaluation.content import text_digest
from batchinfer.evaluation.perplexity import check_windows, score_job
from batchinfer.evaluation.texts import text_of
from batchinfer.model.contents import read_folder
from batchinfer.model.context import context_length
from batchinfer.model.folder import read_json, require_tokenizer, resolve_folder
from batchinfer.model.lora import read_lora
from batchinfer.model.weights import read_weights
from batchinfer.prompt.encode import check_tokenizer
from batchinfer.storage import local_path
from batchinfer.tasks import task_of

#: Prefixes of a path that is not a hub name; `out` is where this program writes by default.
_LOCAL = ("/", "./", "../", "~", "out/")

_Check = Callable[[Planned, Job, Path], None]


def check_inputs(planned: Sequence[Planned], spec_path: str) -> None:
    """Raise ConfigError naming every problem: file, key, label of the first entry that has it."""
    problems = [f"{spec_path}: {problem}" for problem in _problems_of_text(planned[0])]
    # Formats of one entry share its key, and all that is looked at.
    for plan in reversed({plan.key: plan for plan in reversed(planned)}.values()):
        problems += (
            f"{spec_path}: {key} ({plan.label}): {line}"
            for key, error in _problems(plan)
            for line in str(error).splitlines()
        )
    if problems:
        raise ConfigError("\n".join(problems))


def check_plot(shown: Sequence[Planned], x: str, y: str) -> None:
    """Raise ConfigError for a plot that no entry will be in, whatever is measured."""
    if y == "kl" and not any(plan.reference for plan in shown):
        raise ConfigError(
            "--plot -y kl: no entry is compared with a reference: give the spec one, and show an "
            "entry other than it"
        )
    devices = {engine_kind(plan.request.engine).machine().device for plan in shown}
    if x == "peak" and devices == {"cpu"}:
        raise ConfigError(
            "--plot -x peak: peak memory is that of a GPU, and these entries run on the CPU: take "
            "-x memory, the size of the weights"
        )


def _problems_of_text(plan: Planned) -> Iterator[str]:
    data, column = plan.request.data, plan.request.column
    try:
        text_of(data, column).refuse_blank()
        text_digest(data, column)
    except (ConfigError, InputError) as error:
        yield f"data: {error}"


def _problems(plan: Planned) -> Iterator[tuple[str, ConfigError]]:
    """(key, error) of what an entry names."""
    request, key = plan.request, f"{plan.key}.model"
    try:
        folder = resolve_folder(request.model, "model.path", request.settings.get("model.revision"))
        if not (config := folder / "config.json").exists():
            read_json(config, "a model folder needs it")
        key = plan.key
        job = score_job(request, Path("windows"), Path("work"), sets_name="settings")
        check_demand(job, task_of(job).demand)
    except ConfigError as error:
        yield key, _with_advice(error, request.model) if key.endswith(".model") else error
        return
    of_tokenizer = f"{plan.key}.settings" if job.model.tokenizer else f"{plan.key}.model"
    checks: list[tuple[str, _Check]] = [
        (of_tokenizer, _check_tokenizer),
        (f"{plan.key}.settings", _check_lora),
        ("context", _check_context),
    ]
    for key, check in checks:
        try:
            check(plan, job, folder)
        except ConfigError as error:
            yield key, error


def _with_advice(error: ConfigError, model: str) -> ConfigError:
    """What is said of a model that is not there: most often a checkpoint that is to be made."""
    folder = local_path(model)
    if folder.exists():
        return error
    advice = "make that checkpoint first, or leave the entry out with --filter"
    if folder.parent.is_dir() or model.startswith(_LOCAL):
        return ConfigError(f"there is no folder {folder.absolute()}: {advice}")
    return ConfigError(f"{error}. If it is a folder, {advice}")


def _check_tokenizer(_: Planned, job: Job, folder: Path) -> None:
    if job.model.tokenizer:
        folder = resolve_folder(job.model.tokenizer, "model.tokenizer", None)
    require_tokenizer(folder)
    check_tokenizer(folder)


def _check_lora(_: Planned, job: Job, folder: Path) -> None:
    if not job.model.lora:
        return
    try:
        tensors = read_weights(folder).tensors
    except ConfigError:  # of the model, whose row says so
        tensors = {}
    read_lora(job.model.lora, tensors, engine_kind(job.engine.name).machine())


def _check_context(plan: Planned, job: Job, _: Path) -> None:
    try:
        folder = read_folder(job.model, needs_weights=False)
    except ConfigError:
        return
    own = context_length(
        job.model.max_model_len, folder.config, folder.text, folder.tokenizer_path, []
    )
    check_windows(plan.request, own)
