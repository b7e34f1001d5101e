"""Which launch configuration a kernel uses, how the fastest is found, and where that is remembered.

    from tilewright import autotune

    with autotune.on_first_use():            # or TILEWRIGHT_AUTOTUNE=1, or `tilewright tune folder --m 1,16,64,512`
        model(x)
    with autotune.constraints("int4_linear.triton_fused", splits=1):
        model(x)

Without either, a table that comes with the package or that this machine has written decides, else a heuristic: no call
is ever slowed by tuning that nobody asked for. Conversion on a CPU writes such a table (``series``).
Knows no kernel by name.
"""

from tilewright.autotune.modes import on_first_use, tuning_wanted
from tilewright.autotune.offline import Compiler, ShortListed, prune
from tilewright.autotune.shortlist import ShortList
from tilewright.autotune.space import TUNABLES, Choice, Hooks, Trials, Tunable, constraints
from tilewright.autotune.tables import forget_tables
from tilewright.autotune.tuner import Outcome, tune

__all__ = [
    "TUNABLES",
    "Choice",
    "Compiler",
    "Hooks",
    "Outcome",
    "ShortList",
    "ShortListed",
    "Trials",
    "Tunable",
    "constraints",
    "forget_tables",
    "on_first_use",
    "prune",
    "tune",
    "tuning_wanted",
]
