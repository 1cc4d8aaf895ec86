"""The command line: the only place that prints, and that turns errors into text and exit codes."""

import os

# Arrow reads this when it is first imported. Its usual allocator keeps what is freed: 291 MB for a
# million rows against 261 MB, the interpreter's 120 MB included.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "jemalloc")
# jemalloc's default is four heaps for each core, and each keeps a freed page for a second: with
# large kept columns 240 to 310 MB, where one heap takes 177 to 205 MB.
os.environ.setdefault("JE_ARROW_MALLOC_CONF", "narenas:1")

from batchinfer.signals import hold_signals


def main() -> None:
    """Entry point of the command `batchinfer`."""
    hold_signals()  # imports take a while: until a command can say what a signal did, it waits
    from batchinfer.cli.edge import main

    main()
