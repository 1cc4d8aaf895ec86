"""The documentation says what the program does: every key, default, choice, command and option."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import pytest
from pydantic import BaseModel

from batchinfer.cli.app import cli
from batchinfer.config import Job, Message, deciding_keys, load_job
from batchinfer.config.problems import settings, submodel
from batchinfer.config.yaml12 import load_yaml
from batchinfer.errors import BatchInferError
from batchinfer.ledger import layout
from batchinfer.signals import STOP_CODES
from batchinfer.telemetry import Outcome, ServerOutcome

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
}
README = PAGES["README.md"]
START = PAGES["docs/start.md"]
OPERATIONS = PAGES["docs/operations.md"]
ERRORS = PAGES["docs/errors.md"]
JOB_FILE = PAGES["docs/job_file.md"]

_ROW = re.compile(r"^\| `([^`]+)` \| ([^|]+) \| (required|`[^`]*`) \| (.+) \|$", re.MULTILINE)
ROWS = {key: (kind, default, text) for key, kind, default, text in _ROW.findall(JOB_FILE)}
#: What does not fit into a cell is a list below the table, each item beginning with its key.
NOTES = dict(re.findall(r"^- `([^`]+)`: (.+(?:\n  .+)*)", JOB_FILE, re.MULTILINE))
KEYS = [*settings()]
MESSAGE_KEYS = [f"prompt.messages[].{name}" for name in Message.model_fields]


def field_of(key: str) -> Any:
    """The model's field at a dotted key."""
    model: type[BaseModel] = Job
    *sections, name = key.replace("[]", "").split(".")
    for section in sections:
        found = submodel(model.model_fields[section].annotation, in_lists=True)
        assert found is not None
        model = found
    return model.model_fields[name]


def choices_of(annotation: Any) -> set[str]:
    """The texts among which a setting of this type chooses; none for any other type."""
    if get_origin(annotation) is Literal:
        return {choice for choice in get_args(annotation) if isinstance(choice, str)}
    return set()


def yaml_blocks(text: str) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_job_file_page_has_every_key_in_order_and_no_other() -> None:
    documented = [key for key in ROWS if key not in MESSAGE_KEYS]
    assert documented == KEYS
    assert set(MESSAGE_KEYS) <= ROWS.keys()


@pytest.mark.parametrize("key", [*KEYS, *MESSAGE_KEYS])
def test_the_job_file_page_has_the_default(key: str) -> None:
    """The job file page tells the default."""
    field = field_of(key)
    _, default, _ = ROWS[key]
    if field.is_required():
        assert default == "required"
        return
    documented = load_yaml(default.strip("`"), key).data
    actual = field.get_default(call_default_factory=True)
    actual = list(actual) if isinstance(actual, tuple) else actual
    assert (type(documented), documented) == (type(actual), actual) or documented == actual == {}


def test_a_note_of_the_job_file_page_belongs_to_a_key() -> None:
    assert set(NOTES) - {"sampling.structured"} <= ROWS.keys()
    for key, (_, _, text) in ROWS.items():
        assert ("see below" not in text) or key in NOTES, key


@pytest.mark.parametrize("key", [*KEYS, *MESSAGE_KEYS])
def test_the_job_file_page_names_every_choice(key: str) -> None:
    """The job file page tells every choice."""
    named = set(re.findall(r"`([^`]+)`", " ".join([*ROWS[key], NOTES.get(key, "")])))
    assert choices_of(field_of(key).annotation) <= named


def test_the_job_file_page_calls_frozen_what_the_fields_mark() -> None:
    """Of a section that is frozen as a whole the page says so once, above its keys."""
    words = {
        "value": "**Frozen**",
        "resolved": "**Frozen** as resolved",
        "content": "Its content is **frozen**",
    }
    told = {
        key: by
        for by, said in words.items()  # the longer words come later, and win
        for key, (_, _, text) in ROWS.items()
        if said in text.replace("**Frozen.**", "**Frozen**")
    }
    whole = re.findall(r"^## (\w+)[^#]*?whole section is \*\*frozen\*\*", JOB_FILE, re.MULTILINE)
    told |= {key: "value" for key in KEYS if key.split(".")[0] in whole}
    assert told == deciding_keys()


@pytest.mark.parametrize("page", ["README.md", "docs/start.md"])
def test_the_jobs_on_a_page_are_valid(page: str, tmp_path: Path) -> None:
    blocks = [block for block in yaml_blocks(PAGES[page]) if block.startswith("version:")]
    assert blocks
    for index, block in enumerate(blocks):
        path = tmp_path / f"{index}.yaml"
        path.write_text(block)
        job = load_job(path, environ={}).job
        assert (ROOT / job.model.path / "config.json").is_file()
        assert all(list(ROOT.glob(pattern)) for pattern in job.input.path)


def test_every_command_line_on_a_page_is_one_that_the_program_takes() -> None:
    pages = "\n".join([README, START, OPERATIONS, PAGES["docs/serving.md"]]).replace("\\\n", "")
    lines = re.findall(r"^(?:[A-Z_]+=\S+ )*(?:\S+/)?batchinfer (.+)$", pages, re.MULTILINE)
    assert {line.split()[0] for line in lines} == set(cli.commands)
    for line in lines:
        name, *arguments = shlex.split(line.partition(" > ")[0], comments=True)
        with click.Context(cli.commands[name], info_name=name) as context:
            cli.commands[name].parse_args(context, arguments)  # raises click.UsageError


def test_the_last_line_on_the_page_has_the_keys_that_the_program_writes() -> None:
    (line,) = re.findall(r"^{.*}$", OPERATIONS, re.MULTILINE)
    keys = list(Outcome("complete", 0, "out").as_dict())
    assert list(json.loads(line)) == keys
    (of_server,) = re.findall(r"^{.*}$", PAGES["docs/serving.md"], re.MULTILINE)
    assert json.loads(of_server) == ServerOutcome(**json.loads(of_server)).as_dict()
    (table,) = re.findall(r"^\| field \|.*\n\|---.*\n((?:\|.*\n)+)", OPERATIONS, re.MULTILINE)
    fields = [cell for row in table.splitlines() for cell in row.split("|")[1].split(",")]
    assert [field.strip(" `") for field in fields] == keys


def test_the_page_on_errors_names_every_exit_code() -> None:
    pending: list[type[BatchInferError]] = [BatchInferError]
    codes = {0, *STOP_CODES.values()}  # of Stopped, which has no code of its own
    while pending:
        error = pending.pop()
        codes.add(error.exit_code)
        pending += error.__subclasses__()
    documented = re.findall(r"^\| ([\d /]+) \|", ERRORS, re.MULTILINE)
    assert {int(code) for cell in documented for code in cell.split("/")} == codes


@pytest.mark.parametrize(
    "key",
    [
        layout.SUCCESS_KEY,
        layout.JOB_KEY,
        layout.run_key(1),
        layout.status_key(1),
        layout.log_key(1),
    ],
)
def test_the_page_to_start_with_shows_where_things_are_written(key: str) -> None:
    assert key in START


@pytest.mark.parametrize("name", PAGES)
def test_links_between_pages_lead_somewhere(name: str) -> None:
    folder = (ROOT / name).parent
    for target, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", PAGES[name]):
        assert (folder / target).exists(), target
        if heading:
            page = (folder / target).resolve() if target else ROOT / name
            headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]
            assert heading in anchors, f"{target}#{heading}"


@pytest.mark.parametrize("name", PAGES)
def test_no_line_is_wider_than_120_columns(name: str) -> None:
    text = re.sub(r"^<!-- .*?^<!-- [^\n]*end -->$", "", PAGES[name], flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith("{")]  # the last line's JSON
    assert [line for line in lines if len(line) > 120] == []


def test_the_readme_fits_on_a_screen_or_two() -> None:
    assert 60 <= README.count("\n") <= 100
