"""The process of an entry of `batchinfer compare`, on the fake engine (see fake_run)."""

from __future__ import annotations

import json
import os
import sys

from batchinfer.engine.kinds import KINDS
from batchinfer.evaluation.comparison.child import main
from batchinfer.prompt import encode
from batchinfer.testing import FakePlan, LightTokenizer
from tests.support.fake_run import fake_kinds

PROGRAM: tuple[str, ...] = (sys.executable, "-m", "tests.support.fake_child")

if __name__ == "__main__":
    encode._load = lambda path, **_: LightTokenizer(path)
    KINDS.update(fake_kinds(FakePlan(**json.loads(os.environ.get("FAKE_ENGINE", "{}")))))
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
