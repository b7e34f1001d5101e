"""Loads, stores, atomics, asynchronous copies and matrix loads."""

# mypy: ignore-errors
# ruff: noqa: D102, D103, E501, B007
from __future__ import annotations

import numpy as np

from .memory import PTXError
from .numerics import U32, U64, WORD, bits_of, decode, encode
from .ops import Unsupported, builds
from .parser import Addr, Imm, Sym, Vec

_QUALIFIERS = {
    "weak",
    "relaxed",
    "acquire",
    "release",
    "acq_rel",
    "volatile",
    "cta",
    "gpu",
    "sys",
    "cluster",
    "global",
    "shared",
    "shared::cta",
    "param",
    "local",
    "nc",
    "ca",
    "cg",
    "cs",
    "cv",
    "lu",
    "wb",
    "wt",
    "noftz",
    "L1::evict_last",
    "L1::evict_first",
    "L1::no_allocate",
    "L1::evict_normal",
    "L1::evict_unchanged",
    "L2::cache_hint",
    "L2::evict_last",
    "L2::evict_first",
    "L2::64B",
    "L2::128B",
    "L2::256B",
    "v2",
    "v4",
    "mmio",
}


def _space(ins):
    for name in ("global", "shared", "shared::cta", "param", "local", "const"):
        if name in ins.parts:
            return name.split("::")[0]
    return "generic"


def _shape(ins):
    """(vector length, element type, element bytes) of a load or store."""
    unknown = set(ins.parts[1:-1]) - _QUALIFIERS
    if unknown:
        raise Unsupported(f"{ins.opcode}: qualifier {', '.join(sorted(unknown))}")
    count = 4 if "v4" in ins.parts else 2 if "v2" in ins.parts else 1
    kind = ins.parts[-1]
    size = bits_of(kind) // 8
    if size * count > 16:
        raise Unsupported(f"{ins.opcode}: more than 16 bytes a thread")
    return count, kind, size


def _items(operand):
    return list(operand.items) if isinstance(operand, Vec) else [operand]


def address(machine, operand, bits):
    """A function giving the addresses of all threads for a memory operand."""
    if not isinstance(operand, Addr):
        raise Unsupported(f"memory operand {operand}")
    R = machine.registers
    if operand.base is None:
        slot, offset = machine.source(Imm(operand.offset), bits), 0
    else:
        slot, offset = machine.source(operand.base, bits), operand.offset
    shift = WORD[bits](offset & (1 << bits) - 1)
    if not offset:
        return lambda: R[slot]
    return lambda: R[slot] + shift


def _shared_bits(machine, operand):
    """Shared addresses are 32-bit, or 64-bit registers that hold a small value."""
    return machine.width(operand.base) or 32


@builds("ld", "ldu")
def _ld(ins, machine):
    space = _space(ins)
    target, where = ins.operands[0], ins.operands[1]
    if space == "param":
        return _ld_param(ins, machine, target, where)
    if space not in ("global", "shared", "local"):
        raise Unsupported(f"{ins.opcode}: {space} address space")
    count, kind, size = _shape(ins)
    items = [None if item == Sym("_") else item for item in _items(target)]
    slots = [(i, machine.target(item), machine.width(item)) for i, item in enumerate(items) if item is not None]
    signed = kind[0] == "s"
    element = {1: np.uint8, 2: np.uint16, 4: U32, 8: U64}[size]
    signed_element = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[size]
    total = size * count
    place = address(machine, where, 64 if space == "global" else _shared_bits(machine, where))

    def run(mask):
        machine.effective = mask
        lanes = place() if mask is None else place()[mask]
        if space == "local":
            data = machine.local.load(machine.threads_of(mask), lanes, total)
        elif space == "global":
            data = machine.memory.load(lanes, total, machine.cta_numbers(mask))
            machine.stats.note_global(machine, lanes, total, mask, "read")
        else:
            data = machine.shared_load(lanes, total, mask)
            machine.stats.note_shared(machine, lanes, total, mask, "read")
        values = data.view(element).reshape(-1, count)
        for i, slot, width in slots:
            value = values[:, i]
            if size * 8 != width:
                value = (value.view(signed_element) if signed else value).astype(WORD[width])
            machine.write_lanes(slot, value, mask)

    return run


def _ld_param(ins, machine, target, where):
    name = where.base.name
    if isinstance(target, Vec) or where.offset:
        raise Unsupported(ins.opcode)
    slot, width, kind = machine.target(target), machine.width(target), ins.parts[-1]
    R = machine.registers
    source = machine.parameter(name, width)

    def run(mask):
        machine.write(slot, R[source], mask)

    if bits_of(kind) > width:
        raise Unsupported(ins.opcode)
    return run


@builds("st")
def _st(ins, machine):
    space = _space(ins)
    if space not in ("global", "shared", "local"):
        raise Unsupported(f"{ins.opcode}: {space} address space")
    _count, _kind, size = _shape(ins)
    where, values = ins.operands[0], _items(ins.operands[1])
    slots = [machine.source(item, machine.width(item) or max(size * 8, 16)) for item in values]
    element = {1: np.uint8, 2: np.uint16, 4: U32, 8: U64}[size]
    place = address(machine, where, 64 if space == "global" else _shared_bits(machine, where))
    R = machine.registers

    def run(mask):
        machine.effective = mask
        lanes = place() if mask is None else place()[mask]
        columns = [R[s] if mask is None else R[s][mask] for s in slots]
        data = np.stack([c.astype(element, copy=False) for c in columns], axis=1).view(np.uint8)
        if space == "local":
            machine.local.store(machine.threads_of(mask), lanes, data)
        elif space == "global":
            machine.memory.store(lanes, data, machine.cta_numbers(mask))
            machine.stats.note_global(machine, lanes, data.shape[1], mask, "written")
        else:
            machine.shared_store(lanes, data, mask)
            machine.stats.note_shared(machine, lanes, data.shape[1], mask, "written")

    return run


# --------------------------------------------------------------------------------------------------------------- atomics
_ATOMIC = {
    "add": lambda old, new: old + new,
    "min": min,
    "max": max,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "exch": lambda old, new: new,
}


@builds("atom", "red")
def _atom(ins, machine):
    space = _space(ins)
    if space not in ("global", "shared"):
        raise Unsupported(f"{ins.opcode}: {space} address space")
    returns = ins.parts[0] == "atom"
    operation = next((p for p in ins.parts[1:] if p in (*_ATOMIC, "cas")), None)
    unknown = set(ins.parts[1:-1]) - _QUALIFIERS - {operation}
    if operation is None or unknown:
        raise Unsupported(f"{ins.opcode}: {', '.join(sorted(unknown)) or 'operation'}")
    count = 4 if "v4" in ins.parts else 2 if "v2" in ins.parts else 1
    kind = ins.parts[-1]
    bits = bits_of(kind)
    size = bits // 8
    operands = ins.operands[1:] if returns else ins.operands
    place = address(machine, operands[0], 64 if space == "global" else _shared_bits(machine, operands[0]))
    inputs = [[machine.source(item, bits) for item in _items(op)] for op in operands[1:]]
    outputs = (
        [None if item == Sym("_") else machine.target(item) for item in _items(ins.operands[0])] if returns else []
    )
    R, word = machine.registers, WORD[bits]

    def apply(old, values):
        if operation == "cas":
            return values[1] if old == values[0] else old
        if operation in ("exch", "and", "or", "xor"):
            return _ATOMIC[operation](old, values[0])
        a, b = (decode(np.array([x], word), kind) for x in (old, values[0]))
        if operation == "add":
            return encode(a + b, kind)[0]
        return encode((np.minimum if operation == "min" else np.maximum)(a, b), kind)[0]

    def run(mask):
        """One lane after another: any order is allowed, this one is reproducible."""
        machine.effective = mask
        lanes = place() if mask is None else place()[mask]
        arguments = [[R[s] if mask is None else R[s][mask] for s in group] for group in inputs]
        before = np.zeros((len(lanes), count), word)
        load, store = machine.atomic_access(space, mask)
        for lane in range(len(lanes)):
            old = load(lane, lanes[lane], size * count).view(word)[0]
            before[lane] = old
            new = np.array([apply(old[i], [group[i][lane] for group in arguments]) for i in range(count)], word)
            store(lane, lanes[lane], new[None].view(np.uint8))
        if space == "global":
            machine.stats.note_global(machine, lanes, size * count, mask, "written")
        for i, slot in enumerate(outputs):
            if slot is not None:
                machine.write_lanes(slot, before[:, i], mask)

    return run


# ---------------------------------------------------------------------------------------------------- asynchronous copies
@builds("cp")
def _cp(ins, machine):
    if ins.parts[:2] != ["cp", "async"]:
        raise Unsupported(ins.opcode)
    if ins.parts[2] == "commit_group":
        return lambda mask: machine.copies.commit(mask)
    if ins.parts[2] == "wait_all":
        return lambda mask: machine.copies.wait(None, mask)
    if ins.parts[2] == "wait_group":
        pending = ins.operands[0].value
        return lambda mask: machine.copies.wait(pending, mask)
    if ins.parts[2] not in ("ca", "cg") or "mbarrier" in ins.parts:
        raise Unsupported(ins.opcode)
    R = machine.registers
    target = address(machine, ins.operands[0], _shared_bits(machine, ins.operands[0]))
    origin = address(machine, ins.operands[1], 64)
    size = ins.operands[2].value
    has_count = len(ins.operands) > 3 and not ("L2::cache_hint" in ins.parts and len(ins.operands) == 4)
    count = machine.source(ins.operands[3], 32) if has_count else None
    if count is not None and machine.width(ins.operands[3]) == "pred":
        raise Unsupported(ins.opcode + " with ignore-src")

    def run(mask):
        machine.effective = mask
        to, source = target(), origin()
        taken = None if count is None else R[count]
        if mask is not None:
            to, source = to[mask], source[mask]
            taken = None if taken is None else taken[mask]
        if taken is None or (taken == size).all():
            data = machine.memory.load(source, size)
            machine.stats.note_global(machine, source, size, mask, "read")
        else:  # the rest of a short copy is filled with zeros
            data = np.zeros((len(to), size), np.uint8)
            for amount in np.unique(taken):
                if amount > size:
                    raise PTXError(f"cp.async source size {amount} exceeds the copy size {size}", int(np.argmax(taken)))
                if amount:
                    lanes = np.flatnonzero(taken == amount)
                    for piece in range(0, int(amount), np.gcd(int(amount), size)):
                        step = int(np.gcd(int(amount), size))
                        data[lanes, piece : piece + step] = machine.memory.load(source[lanes] + U64(piece), step)
            some = taken > 0
            if some.any():
                inner = some if mask is None else machine.scatter_mask(mask, some)
                machine.stats.note_global(machine, source[some], size, inner, "read")
        machine.copies.issue(to, data, mask)
        machine.stats.note_shared(machine, to, size, mask, "written")

    return run


class AsyncCopies:
    """``cp.async`` in flight. Data land only when the issuing thread waits for the group."""

    def __init__(self, machine):
        self.machine = machine
        self.committed = np.zeros(machine.lanes, np.int64)  # groups committed so far by each thread
        self.flying = []  # [threads, group of each, flat offset, data, warp]

    def issue(self, to, data, mask):
        m = self.machine
        threads = m.threads_of(mask)
        warp = m.warp_of[threads]
        flat = m.shared.flat(m.cta_of[threads], to, data.shape[1], "write")
        m.shared.begin_copy(flat, data.shape[1], warp)
        self.flying.append([threads, self.committed[threads].copy(), flat, data, warp])

    def commit(self, mask):
        if mask is None:
            self.committed += 1
        else:
            self.committed[mask] += 1

    def wait(self, pending, mask):
        """Land what the threads in ``mask`` committed, but for their ``pending`` latest groups (None: land all)."""
        kept = []
        for entry in self.flying:
            threads, group, flat, data, warp = entry
            ready = np.ones(len(threads), bool) if pending is None else group < self.committed[threads] - pending
            if mask is not None:
                ready &= mask[threads]
            if ready.all():
                self.machine.shared.land_copy(flat, data, warp)
            elif ready.any():
                self.machine.shared.land_copy(flat[ready], data[ready], warp[ready])
                kept.append([part[~ready] for part in entry])
            else:
                kept.append(entry)
        self.flying = kept


# ------------------------------------------------------------------------------------------------------- matrix movement
@builds("ldmatrix", "stmatrix")
def _matrix(ins, machine):
    number = next((int(p[1]) for p in ins.parts if p in ("x1", "x2", "x4")), None)
    if "m8n8" not in ins.parts or ins.parts[-1] != "b16" or number is None:
        raise Unsupported(ins.opcode)
    load, transposed = ins.parts[0] == "ldmatrix", "trans" in ins.parts
    registers, where = (ins.operands[0], ins.operands[1]) if load else (ins.operands[1], ins.operands[0])
    slots = [machine.target(item) if load else machine.source(item, 32) for item in _items(registers)]
    place = address(machine, where, _shared_bits(machine, where))
    R = machine.registers

    def run(mask):
        warps = machine.full_warps(mask, ins.parts[0])
        rows = place().reshape(-1, 32)[warps, : 8 * number]
        count = len(rows)
        threads = (np.arange(machine.lanes).reshape(-1, 32)[warps, : 8 * number]).reshape(-1)
        machine.effective = threads
        flat = machine.shared.flat(machine.cta_of[threads], rows.reshape(-1), 16, "row access")
        warp = machine.warp_of[threads]
        machine.stats.note_phases(rows.reshape(-1, 8), 16, "read" if load else "written")
        if load:
            data = machine.shared.load(flat, 16, warp).reshape(count, number, 8, 16)
            if transposed:
                data = np.ascontiguousarray(data.view(np.uint16).transpose(0, 1, 3, 2))
            values = data.view(U32).reshape(count, number, 32)
            for i, slot in enumerate(slots):
                machine.write_warps(slot, values[:, i], mask, warps)
            return
        values = np.stack([R[s].reshape(-1, 32)[warps] for s in slots], axis=1).reshape(count, number, 8, 4)
        data = np.ascontiguousarray(values).view(np.uint16)
        if transposed:
            data = np.ascontiguousarray(data.transpose(0, 1, 3, 2))
        machine.shared.store(flat, np.ascontiguousarray(data).view(np.uint8).reshape(-1, 16), warp)

    return run


@builds("prefetch", "prefetchu", "discard", "applypriority", "createpolicy")
def _hint(ins, machine):
    if ins.parts[0] == "createpolicy":
        slot = machine.target(ins.operands[0])
        zero = machine.source(Imm(0), 64)
        return lambda mask: machine.write(slot, machine.registers[zero], mask)
    return lambda mask: None
