"""Search for networks that a conversion gets wrong: ``python -m tests.fuzz --minutes 30``.

The first failure is made as small as Hypothesis can and printed as a module of PyTorch; the search ends there.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import threading

import torch
from hypothesis import given, seed, settings

from tests.fuzz.judge import FORMATS, Judge
from tests.fuzz.programs import SETTINGS, Program, programs
from tests.fuzz.writer import HAZARDS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--format", choices=FORMATS, action="append", help="only these ways to convert")
    parser.add_argument("--without", choices=sorted(set(HAZARDS.values())), action="append", default=[])
    parser.add_argument("--seed", type=int, default=None, help="of the first round; drawn if it is not given")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    over = threading.Event()
    clock = threading.Timer(60 * options.minutes, over.set)
    clock.daemon = True
    clock.start()
    first = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    tried, turn = 0, 0
    while not over.is_set():

        @seed(first + turn)
        @settings(SETTINGS, max_examples=200)
        @given(programs(without=tuple(options.without)))
        def search(program: Program) -> None:
            nonlocal tried
            tried += 1
            for name in options.format or FORMATS:
                Judge(program, FORMATS[name])()

        try:
            search()
        except Exception as error:
            print(f"seed {first + turn}, after {tried} programs: {error}")
            return 1
        turn += 1
        print(f"{tried} programs, nothing found (seed {first + turn - 1})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
