"""Short lists as files: the candidates that compiling kept of each space, most promising first.

    {"format": 2, "target": "sm_90", "triton": "3.7.1", "lists": {key: {
        "fields": ["block_m", "num_warps"],
        "kept": [[[64, 4], registers, shared_bytes, filling, "wgmma"], ...],
        "dropped": [[[128, 4], "32 bytes of registers spill"], ...]}}}

``tilewright tune --offline --target sm_90`` writes one. One that comes with the package, in ``shortlists/``, is what
tuning on such a chip times without being told. A key ends in a hash of the kernel's source: a list of other code is
passed over, and the whole space is timed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tilewright.autotune.device import triton_version
from tilewright.autotune.offline import ShortListed
from tilewright.autotune.space import TUNABLES, Tunable
from tilewright.autotune.store import MAX_BYTES, SCALARS, TableError

FORMAT = 2
SHIPPED = Path(__file__).parent / "shortlists"
_Found = dict[str, list[Any]]


def _key(tunable: Tunable, problem: Any) -> str:
    """Without driver and device: compiled code depends on the target, which the list names. Without Triton's version
    too: another makes code that differs little, and what is kept is timed anyway.
    """
    facts = [f"{what}={value}" for what, value in tunable.hooks.facts(problem).items()]
    return " | ".join([tunable.name, *facts, f"source={tunable.source()}"])


def _is_current(key: str) -> bool | None:
    """Whether a list is of the kernel as it is; None for a kernel that has not been imported."""
    name, *_, source = key.split(" | ")
    return f"source={TUNABLES[name].source()}" == source if name in TUNABLES else None


class ShortList:
    """The short lists for one target. triton: the version whose compiler made them."""

    def __init__(self, target: str, triton: str | None = None) -> None:
        self.target = target
        self.triton = triton or triton_version()
        self.lists: dict[str, _Found] = {}

    @classmethod
    def read(cls, path: Path) -> ShortList:
        """The file at ``path``. Raises TableError for what is no short list, OSError for what cannot be read."""
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise TableError(f"{path} is larger than {MAX_BYTES} bytes")
        try:
            data = json.loads(raw)
            if data["format"] != FORMAT:
                raise TableError(f"{path} has the format {data['format']!r}, not {FORMAT}")
            made = cls(str(data["target"]), str(data["triton"]))
            made.lists = {str(key): _checked(found) for key, found in data["lists"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TableError(f"{path} is no short list of candidates: {error}") from error
        return made

    def add(self, found: ShortListed) -> None:
        """Take in what ``prune`` found, in place of what other code of the same kernel left."""
        tunable = found.tunable
        self.lists = {key: value for key, value in self.lists.items() if _is_current(key) is not False}
        encoded = {config: tunable.encode(config) for config in (*found.kept, *found.dropped)}
        fields = list(dict.fromkeys(name for one in encoded.values() for name in one))

        def row(config: Any) -> list[Any]:
            return [encoded[config][name] for name in fields]

        self.lists[_key(tunable, found.problem)] = {
            "fields": fields,
            "kept": [
                [row(config), one.registers, one.shared_bytes, one.filling, one.matrix]
                for config, one in found.kept.items()
            ],
            "dropped": [[row(config), reason] for config, reason in found.dropped.items()],
        }

    def write(self, path: Path) -> None:
        """Replace the file at ``path``; a line for each configuration. Raises OSError."""
        lists = ",\n".join(f"{json.dumps(key)}: {_in_lines(found)}" for key, found in sorted(self.lists.items()))
        head = json.dumps({"format": FORMAT, "target": self.target, "triton": self.triton})
        partial = path.with_name(path.name + ".partial")
        partial.write_text(f'{head[:-1]}, "lists": {{\n{lists}\n}}}}\n', encoding="utf-8")
        partial.replace(path)

    def of(self, tunable: Tunable, problem: Any) -> _Found | None:
        """What is known of ``problem`` and of the kernel as it is now."""
        return self.lists.get(_key(tunable, tunable.hooks.representative(problem)))

    def candidates(self, tunable: Tunable, problem: Any) -> list[Any] | None:
        """Those kept for ``problem``, most promising first; None if the list does not speak of it, or of other code."""
        found = self.of(tunable, problem)
        if found is None:
            return None
        decode = tunable.decoder(tunable.hooks.representative(problem))
        kept = (decode(dict(zip(found["fields"], row[0], strict=True))) for row in found["kept"])
        return [config for config in kept if config is not None]

    def outdated(self) -> list[str]:
        """Keys of lists that are of other code than the kernels that have been imported."""
        return [key for key in self.lists if _is_current(key) is False]


def _checked(found: Mapping[str, Any]) -> _Found:
    """One list in the form that ``add`` makes, or an error that ``read`` turns into words."""
    fields = [str(name) for name in found["fields"]]
    for kind in ("kept", "dropped"):
        for row in found[kind]:
            if len(row[0]) != len(fields) or not all(isinstance(value, SCALARS) for value in row[0]):
                raise ValueError(f"{row[0]!r} is no configuration of {', '.join(fields)}"[:200])
    return {"fields": fields, "kept": list(found["kept"]), "dropped": list(found["dropped"])}


def _in_lines(found: _Found) -> str:
    def lines(rows: list[Any]) -> str:
        return "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "]" if rows else "[]"

    fields = json.dumps(found["fields"])
    return f'{{"fields": {fields}, "kept": {lines(found["kept"])}, "dropped": {lines(found["dropped"])}}}'


@functools.cache
def shipped(arch: str) -> ShortList | None:
    """The list that comes with the package for an architecture such as "sm_90"; None where there is none."""
    path = SHIPPED / f"{arch}.json"
    return ShortList.read(path) if path.is_file() else None
