"""What conversions still get wrong: hazards that random networks are drawn without, and programs that must fail."""

from __future__ import annotations

STATE = "state that forward writes is shared with the original, or frozen by the recording"
INPUT = "a recording does not write the caller's input as the network does"
ALIAS = "symbolic tracing knows nothing of names that share memory"

#: Hazards that random networks must not hold yet.
WITHOUT = ("alias", "in place", "state", "input")
#: Programs of ``found`` that fail, with the cause.
FAILING: dict[tuple[str, str], str] = {
    ("alias", "between two convolutions"): ALIAS,
    ("in place", "an older name"): ALIAS,
    ("in place", "past an operator that changes the input"): ALIAS,
    ("state", "a buffer counts"): STATE,
    ("state", "a buffer counts beside a linear layer"): STATE,
    ("state", "an attribute counts"): STATE,
    ("state", "a buffer is assigned"): STATE,
    ("state", "the last call is remembered"): STATE,
    ("input", "written after it was read"): INPUT,
    ("input", "normalised in place"): INPUT,
    ("input", "by an activation"): INPUT,
}
