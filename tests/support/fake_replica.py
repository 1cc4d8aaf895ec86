"""The process of a replica on the fake engine (see fake_run).

FAKE_REPLICAS (JSON): {"0": {…}}: of FakePlan for the n-th place, over FAKE_ENGINE.
"""

from __future__ import annotations

import json
import os
import sys

from batchinfer.runner.replicas.child import main
from tests.support.fake_run import prepare_fakes

if __name__ == "__main__":
    own = json.loads(os.environ.get("FAKE_REPLICAS", "{}")).get(
        os.environ.get("FAKE_DEVICE", "0"), {}
    )
    plan = json.loads(os.environ.get("FAKE_ENGINE", "{}"))
    os.environ["FAKE_ENGINE"] = json.dumps(plan | own)
    prepare_fakes()
    main(sys.argv[1])
