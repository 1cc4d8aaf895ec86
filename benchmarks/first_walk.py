"""A first walk through a terminal, as the screens of docs/first_walk.md.

    python -m benchmarks.first_walk [--print]

init, try, run, show, serve and chat, as somebody goes who reads nothing but the screen: Enter for
each default, and the command that the last line names. It is walked in tmux, in a folder that has
nothing but `jobs/`, on the demo model, and ends with 1 where a step does not show what the next one
needs. --print writes the page to stdout and leaves the file alone.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common import ROOT

PAGE = ROOT / "docs" / "first_walk.md"
HOME = "/home/me/batchinfer"  # in place of the folder that it is walked in
SIZE = (100, 60)
_WAIT_S = 300.0
_LOOK_S = 0.2

_HEAD = (
    "# A first walk\n\n"
    "From nothing to a served model, by reading nothing but the screen: Enter takes what is in "
    "brackets, and the last lines of each command name the next one. These are the screens of a "
    "terminal of 100 columns on the demo model, in a checkout after `make setup`, with `.venv/bin` "
    "in `PATH`; `python -m benchmarks.first_walk` walks again and writes this page. What is no "
    "terminal (a pipe, a scheduler's log) gets none of the lines that say what comes next."
)


class Terminal:
    """A shell in tmux."""

    def __init__(self, socket: str, folder: Path) -> None:
        self._tmux = ["tmux", "-L", socket, "-f", "/dev/null"]
        environ = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        environ |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PS1": "$ "}
        environ.pop("TMUX", None)
        width, height = map(str, SIZE)
        subprocess.run(
            [*self._tmux, "new-session", "-d", "-x", width, "-y", height, "bash", "--norc"],
            cwd=folder,
            env=environ,
            check=True,
        )
        self.wait(r"^\$$")

    def type(self, text: str) -> None:
        self._do("send-keys", "-l", "--", text)
        self._do("send-keys", "Enter")

    def press(self, key: str) -> None:
        self._do("send-keys", key)

    def clear(self) -> None:
        """The next command stands at the top, after the prompt."""
        self._do("send-keys", "-R")
        self._do("clear-history")
        self._do("send-keys", "Enter")
        self.wait(r"^\$$")

    def wait(self, shown: str) -> str:
        """The screen, once a line of it fits; what has scrolled away belongs to it."""
        deadline_s = time.monotonic() + _WAIT_S
        while not re.search(shown, screen := self.screen(), re.MULTILINE):
            if time.monotonic() > deadline_s:
                sys.exit(f"{shown!r} is not on the screen:\n{screen}")
            time.sleep(_LOOK_S)
        return screen

    def screen(self) -> str:
        done = subprocess.run(
            [*self._tmux, "capture-pane", "-p", "-S", "-"],
            capture_output=True,
            text=True,
            check=True,
        )
        lines = [line.rstrip() for line in done.stdout.splitlines()]
        return "\n".join(lines).rstrip("\n")

    def close(self) -> None:
        subprocess.run([*self._tmux, "kill-server"], check=False, capture_output=True)

    def _do(self, *command: str) -> None:
        subprocess.run([*self._tmux, *command], check=True)


def walk(first: Terminal, second: Terminal) -> Iterator[tuple[str, str]]:
    """(what stands above it, screen)."""
    first.type("batchinfer init")
    for question in ("input", "model", "quantization", "task", "column with the text", "message"):
        _answer(first, question)
    _answer(first, "most tokens")
    _answer(first, "column with the row's id")
    _answer(first, "output")
    first.wait(r"try the first row now\?")
    yield "Nine questions, each with an answer from what is in the folder:", first.screen()
    first.press("Enter")
    yield (
        "Enter once more loads the model and shows one row as `batchinfer try job.yaml` does: the "
        "prompt as it is sent, then the answer, token by token.",
        _since(first.wait(r"^next: "), "Load the model"),
    )
    for command, text in (
        (r"run \S+ --limit 20", "Twenty rows, while a bar shows how far they are:"),
        (r"show \S+", "What came out:"),
        (r"run \S+", "All the others. What is finished is not computed again:"),
    ):
        found = _named(first.screen(), command)
        first.clear()
        first.type(found)
        yield text, first.wait(r"^next: ")
    found = _named(first.screen(), r"serve \S+")
    first.clear()
    first.type(found)
    yield "The same model for OpenAI's clients:", first.wait(r"^ +-d '.*'$")
    asked = first.screen().partition("it:\n")[2].strip()
    second.clear()
    for line in asked.splitlines():
        second.type(line.strip())
    yield "asked from another terminal:", second.wait(r'"usage"(?s:.*)\$$')
    first.press("C-c")
    yield "Ctrl-C there:", _since(first.wait(r"^next: "), r"\^C")
    found = _named(first.screen(), r"chat \S+")
    first.clear()
    first.type(found)
    first.wait(r"^>$")
    first.type("A tool to edit text files with syntax highlighting")
    first.wait(r"tokens/s(?s:.*)^>$")
    first.press("C-d")
    yield "And a talk with it:", first.wait(r"^>\n\$$")


def _answer(terminal: Terminal, question: str) -> None:
    """With its default."""
    terminal.wait(rf"^{question}[^\n]*\[[^\n]*\]:\s*\Z")
    terminal.press("Enter")


def _named(screen: str, command: str) -> str:
    """A command that the last lines name."""
    last_lines = screen[screen.rindex("\nnext: ") :]
    found = re.search(rf"(batchinfer {command})  #", last_lines)
    if found is None:
        sys.exit(f"the last lines do not name batchinfer {command}:\n{last_lines}")
    return re.sub(r"\s+", " ", found[1]).strip()


def _since(screen: str, pattern: str) -> str:
    """From the last line that the pattern fits."""
    lines = screen.splitlines()
    return "\n".join(lines[max(i for i, line in enumerate(lines) if re.search(pattern, line)) :])


@contextmanager
def terminals() -> Iterator[tuple[Path, Terminal, Terminal]]:
    """The folder, and two terminals in it."""
    with tempfile.TemporaryDirectory(prefix="batchinfer-walk-") as name:
        folder = Path(name)
        shutil.copytree(ROOT / "jobs", folder / "jobs")
        opened: list[Terminal] = []
        try:
            for number in (1, 2):
                opened.append(Terminal(f"batchinfer-walk-{os.getpid()}-{number}", folder))
            yield folder, opened[0], opened[1]
        finally:
            for terminal in opened:
                terminal.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--print", action="store_true", help="write the page to stdout")
    arguments = parser.parse_args()
    if shutil.which("tmux") is None:
        sys.exit("first_walk needs tmux")
    parts = [textwrap.fill(paragraph, 120) for paragraph in _HEAD.split("\n\n")]
    with terminals() as (folder, first, second):
        for text, screen in walk(first, second):
            shown = screen.replace(str(folder), HOME)
            shown = re.sub(r"\A(?:\$?\n)+", "", shown)  # what `clear` left
            parts += [textwrap.fill(text, 120), f"```\n{shown}\n```"]
            sys.stderr.write(f"{text}\n")
    page = "\n\n".join(parts) + "\n"
    if arguments.print:
        sys.stdout.write(page)
    else:
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
