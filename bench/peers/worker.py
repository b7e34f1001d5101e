"""The process of one contestant: makes its calls, shows their results and times them when it is its turn.

It first says what it runs on, then answers each line of JSON on standard input by one:

    {"work": NAME, "result": FILE}              write the result, in float32 -> {"shape": [...]}, or {"missing": WHY}
    {"work": NAME, "seconds": S}                time a turn                  -> {"seconds": [...]}
    {"work": NAME, "count": true}               what is multiplied and read  -> the fields of ``floor.Counts``; of eager
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.missing import Missing, need
from bench.peers import pytorch
from bench.peers.contestants import CONTESTANTS, Contestant, Prepared
from bench.peers.work import WORK, Work
from bench.timer import block


def prepare(contestant: Contestant, work: Work, folder: Path, threads: int) -> Prepared:
    """Raises Missing where a package is not installed or does not do this."""
    for package in contestant.packages:
        need(package)
    module, _, function = contestant.maker.partition(":")
    return getattr(importlib.import_module(module), function)(work.model, work.shape, work.decode, folder, threads)


def result_of(prepared: Prepared) -> torch.Tensor:
    """What is compared. Three calls: later ones may take a shorter way than the first."""
    for _ in range(3):
        found = (prepared.result or prepared.call)()
        if prepared.between is not None:
            prepared.between()
    return found.detach().float().contiguous()


def answer(
    prepared: dict[str, Prepared], contestant: Contestant, request: dict[str, Any], folder: Path, threads: int
) -> dict[str, Any]:
    """To one request."""
    name = request["work"]
    if "count" in request:
        return asdict(pytorch.count(WORK[name]))
    if "result" not in request:
        made = prepared[name]
        taken = block(made.call, seconds=request["seconds"], between=made.between, own_clock=made.own_clock)
        return {"seconds": [value / made.steps for value in taken]}
    try:
        prepared[name] = prepare(contestant, WORK[name], folder, threads)
        result = result_of(prepared[name])
    # A peer may fail in any way: the table says how.
    except Exception as error:
        kind = "" if isinstance(error, Missing) else f"{type(error).__name__}: "
        return {"missing": (kind + " ".join(str(error).split()))[:200]}
    result.numpy().tofile(request["result"])
    return {"shape": list(result.shape)}


def main() -> None:
    """Answer requests until standard input ends. Arguments: contestant, folder for files, threads."""
    contestant, folder, threads = CONTESTANTS[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(threads)
    print(json.dumps({"contestant": contestant.name}), file=answers)
    prepared: dict[str, Prepared] = {}
    for line in sys.stdin:
        print(json.dumps(answer(prepared, contestant, json.loads(line), folder, threads)), file=answers)


if __name__ == "__main__":
    main()
