"""How long a regular expression may take: Python's matcher tries one way after another and knows no limit."""

from __future__ import annotations

import sys
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as codes  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_constants as codes
    import sre_parse as parser

#: What an open repeat counts for: about the length of a module's name.
_OPEN = 64
#: Ways that may be tried: those of five open repeats beside each other, a fraction of a second.
MOST_WAYS = 10_000_000


def ways_to_match(expression: str) -> int:
    """About how many ways there are to match ``expression`` with a name of 64 characters; at most ``MOST_WAYS`` + 1.

    The parts of a sequence multiply, alternatives add up, and what is repeated counts once for each repetition. Open
    repeats beside each other share the name: k of them count for 64^k / k!. Raises ``re.error`` for what is none.
    """
    return _sequence(parser.parse(expression))


def _sequence(items: Any) -> int:
    ways, opened = 1, 0
    for code, argument in items:
        factor = _one(code, argument)
        opened += factor >= _OPEN
        ways = min(ways * (factor // opened if factor >= _OPEN else factor), MOST_WAYS + 1)
    return ways


def _one(code: Any, argument: Any) -> int:
    if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
        least, most, body = argument
        most, inside = min(most, _OPEN), _sequence(body)
        return max(1, most - least + 1) * (1 if inside == 1 else min(inside**most, MOST_WAYS + 1))
    if code is codes.BRANCH:
        return sum(map(_sequence, argument[1]))
    if code is codes.SUBPATTERN:
        return _sequence(argument[-1])
    if code in (codes.ASSERT, codes.ASSERT_NOT):
        return _sequence(argument[1])
    if code is codes.GROUPREF_EXISTS:
        return sum(_sequence(each) for each in argument[1:] if each is not None)
    # Possessive repeats and atomic groups, which Python 3.11 has, are matched in one way, found among those inside.
    inner = argument[-1] if str(code) == "POSSESSIVE_REPEAT" else argument if str(code) == "ATOMIC_GROUP" else ()
    return _sequence(inner)
