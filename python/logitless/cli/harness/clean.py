"""``python -m logitless.cli.harness.clean REQUEST``: one memory measurement, one process."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from logitless.cli.harness.cases import Case, problem
from logitless.cli.harness.contenders import CONTENDERS
from logitless.cli.harness.memory import PeakMeter

WARM_UP = {"rows": 32, "classes": 512}


def measure(request: dict[str, Any]) -> int:
    """Warm up at a tiny size, then return the peak growth of one call at full size, in bytes."""
    case = Case(**request["case"])
    contender = CONTENDERS[request["contender"]]
    first = case if contender.specialised else Case(**{**request["case"], **WARM_UP})
    contender.step(problem(first, request["seed"]), request["mode"])()
    step = contender.step(problem(case, request["seed"]), request["mode"])
    meter = PeakMeter(torch.device(case.device))
    meter.start()
    result = step()
    growth = meter.stop()
    del result
    return growth


if __name__ == "__main__":
    print(json.dumps({"growth": measure(json.loads(sys.argv[1]))}))
