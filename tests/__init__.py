"""What the tests' own process begins with, and those that it starts."""

import os

# Many tests start Python, which would compile our modules anew each time: a third of its work.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# One thread for torch: two that wait for each other at every layer compute for minutes what one
# computes in seconds, as soon as another worker or anybody else needs the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
