"""How a contender's process tells the harness when generation began and ended.

Lines of JSON in `events.jsonl` of its output folder; times are seconds since the epoch, so that
they compare with the change times of files.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

FILE = "events.jsonl"


def tell(output: Path, event: str, **fields: Any) -> None:
    with (output / FILE).open("a") as file:
        file.write(json.dumps({"event": event, "at": time.time(), **fields}) + "\n")


def told(output: Path) -> list[dict[str, Any]]:
    path = output / FILE
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
