"""``save_model`` and ``load_model``: safetensors files and one JSON manifest in a folder. Nothing is pickled.

Loading builds the model on the meta device, so its float weights never exist, and checks everything against what the
model needs before a byte of data is used. A save replaces an older one at the moment its manifest is renamed into place
(``folder``).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from tilewright.convert import foreign_saves, layers, structure
from tilewright.convert.account import recorded
from tilewright.convert.checkpoint import restore
from tilewright.convert.checkpoint.building import build, factory_of
from tilewright.convert.checkpoint.folder import opened, saving
from tilewright.convert.checkpoint.formats import format_of
from tilewright.convert.checkpoint.manifest import FILE_NAME, Layer, Manifest, Stored
from tilewright.convert.checkpoint.safetensors_file import (
    DTYPE_NAMES,
    CheckpointError,
    read_tensor,
    write_file,
)
from tilewright.convert.checkpoint.slots import Slot, hidden_meta_tensors, slots
from tilewright.convert.graph import attention, fuse_named, fused_activations
from tilewright.convert.network.blocks import install_blocks
from tilewright.convert.text import display_name, listed
from tilewright.nn import ConvLayer, QuantizedLinear
from tilewright.nn.kinds import registered_kinds

#: Attributes of every module, which no checkpoint may write.
_INTERNAL = frozenset(vars(nn.Module()))


def save_model(model: nn.Module, directory: str | os.PathLike[str], *, max_shard_bytes: int = 4 * 2**30) -> None:
    """Write ``model`` into ``directory``, which is made if need be.

    Everything that holds a tensor is written: parameters, buffers, also non-persistent ones, and tensors in plain
    attributes. Data files are split at ``max_shard_bytes`` (a larger tensor gets a file of its own). An older save
    there is replaced, in one step: whoever loads meanwhile gets the older model or the newer one. Saves into one folder
    wait for each other, and what killed ones left there is removed; on Windows and on file systems without locks
    (``flock``) neither is done, so there let one process save at a time. Raises ValueError for what cannot be stored
    faithfully: tensors on the meta device or of an exotic dtype, extra state, partly overlapping tensors.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, not {max_shard_bytes}")
    places = slots(model)
    tied = _check_storable(model, places)
    kept = {name: slot.tensor for name, slot in places.items() if name not in tied}
    shards = _split(kept, max_shard_bytes)
    with saving(Path(directory)) as save:
        digests: dict[str, str] = {}
        for names in shards:
            digests |= write_file(save.temporary(), {name: kept[name] for name in names}, {"format": "pt"})
        titles = _titles(shards, kept, digests)
        shard_of = {name: title for title, names in zip(titles, shards, strict=True) for name in names}
        manifest = _describe(model, places, tied, digests, shard_of)
        with save.temporary().open("wb") as file:
            file.write(manifest.to_bytes())
            file.flush()
            os.fsync(file.fileno())
        save.publish(titles)


def _titles(shards: list[list[str]], tensors: dict[str, torch.Tensor], digests: dict[str, str]) -> list[str]:
    """Names for the data files, equal only for equal files: a reader of an older save may be about to open it."""
    content = [[(name, str(tensors[name].dtype), [*tensors[name].shape], digests[name]) for name in s] for s in shards]
    mark = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
    return [f"model-{mark}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]


def _describe(
    model: nn.Module, places: dict[str, Slot], tied: dict[str, str], digests: dict[str, str], shard_of: dict[str, str]
) -> Manifest:
    tensors = {}
    for name, digest in digests.items():
        tensor, kind = places[name].tensor, places[name].kind
        shape = tuple(tensor.shape)
        tensors[name] = Stored(tensor.dtype, shape, shard_of[name], digest, kind, tensor.requires_grad)
    converted = {
        name: Layer(type(module).__name__, {**module.config(), "activation": module.activation})
        for name, module in model.named_modules()
        if isinstance(module, layers.CONVERTED)
    }
    differing = [name for name, module in model.named_modules() if module.training != model.training]
    fused = fused_activations(model)
    folded = restore.folded_norms(model)
    return Manifest(recorded(model), converted, tensors, tied, model.training, differing, fused, folded)


def _check_storable(model: nn.Module, places: dict[str, Slot]) -> dict[str, str]:
    """Names of tensors that are another one: alias -> first name. Raises ValueError for what cannot be stored."""
    kinds = registered_kinds()
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(
                f"{display_name(name)!r} ({type(module).__name__}) has extra state, which may not be a tensor"
            )
        if isinstance(module, layers.CONVERTED) and kinds.get(type(module).__name__) is not type(module):
            raise ValueError(f"{display_name(name)!r} is a {type(module).__name__}, which load_model does not know")
    tied: dict[str, str] = {}
    first: dict[object, str] = {}
    extents = []
    for name, slot in places.items():
        tensor = slot.tensor
        if tensor.is_meta:
            raise ValueError(f"the tensor {name!r} is on the meta device and has no values to save")
        if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided or type(tensor.data) is not torch.Tensor:
            raise ValueError(
                f"the tensor {name!r} ({type(tensor.data).__name__}, {tensor.dtype}) has no place in safetensors"
            )
        extent = structure.memory_extent(tensor)
        identity = id(tensor) if extent is None else (extent, tensor.shape, tensor.stride(), tensor.dtype)
        if identity in first:
            tied[name] = first[identity]
            continue
        first[identity] = name
        if extent is not None:
            extents.append((*extent, name))
    extents.sort()
    for (storage, _, end, name), (next_storage, begin, _, next_name) in pairwise(extents):
        if storage == next_storage and begin < end:
            raise ValueError(f"the tensors {name!r} and {next_name!r} overlap in memory without being the same")
    return tied


def _split(tensors: dict[str, torch.Tensor], limit: int) -> list[list[str]]:
    """Names of the tensors of each data file, in order. At least one file."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def load_model(
    directory: str | os.PathLike[str], factory: Callable[[], nn.Module], *, device: str | torch.device = "cpu"
) -> nn.Module:
    """The model that ``save_model`` wrote into ``directory``.

    factory: makes the *unconverted* model, as in ``lambda: AutoModel.from_config(config)``. It runs on the meta
    device, so that no float weight is made, or with memory where it cannot, as in
    ``lambda: AutoModel.from_pretrained(path)``; an instance in its place is copied. The layers are then replaced as the
    manifest says and the tensors put in, on ``device``. Training modes, ties and ``requires_grad`` are those of the
    saved model. Raises CheckpointError, which names file and tensor, if anything in the folder is missing, damaged,
    hostile or of another model; TypeError, which says what to write, for a factory that makes no such model. Where
    there is no manifest, a format that ``register_checkpoint_format`` added may read the folder.
    """
    folder, make = Path(directory), factory_of(factory)
    if not (folder / FILE_NAME).exists() and (other := format_of(folder)) is not None:
        return other.load(folder, make, torch.device(device))
    with opened(folder) as (manifest, shards):
        model = _swap_in(build(make), manifest, folder / FILE_NAME)
        places, current = slots(model), restore.names_of_before(model)
        manifest.rename(current)
        _settle_what_calls_left(model, places, manifest)
        _check_names(places, manifest, folder / FILE_NAME, type(model).__name__)
        loaded: dict[str, torch.Tensor] = {}
        for shard, (file, entries, start) in shards.items():
            for written, entry in entries.items():
                name = current.get(written, written)
                if name not in places:
                    continue
                tensor = read_tensor(file, folder / shard, written, entry, start, manifest.tensors[name].sha256)
                _check_values(places[name], name, tensor, folder / shard)
                loaded[name] = tensor.to(device)
    _put_in(places, manifest, loaded)
    restore.finish(model, dict(manifest.record.untraced))
    if hidden := hidden_meta_tensors(model):
        raise CheckpointError(
            f"{type(model).__name__} keeps tensors in containers that no checkpoint can fill: {listed(hidden)}; "
            "make them on an explicit device"
        )
    other_mode = set(manifest.differing)
    for name, module in model.named_modules():
        module.training = manifest.training != (name in other_mode)
    structure.FastPaths.close(model, layers.is_converted)
    foreign_saves.guard(model)
    if manifest.record.attention:
        manifest.record.attention = attention.use(model)
    install_blocks(model)
    if manifest.layers:
        manifest.record.attach(model)
    return model


def _swap_in(model: nn.Module, manifest: Manifest, path: Path) -> nn.Module:
    """Replace what was converted by empty quantised modules. Returns the root."""
    parts, modules = structure.Places(model), dict(model.named_modules())
    for name, layer in manifest.layers.items():
        old = modules.get(name)
        where = f"{path}: layer {name!r}"
        if old is None:
            raise CheckpointError(f"{where}: {type(model).__name__} has no such layer")
        new = _build_empty(layer, where)
        if reason := restore.why_not_in_place_of(old, new):
            raise CheckpointError(f"{where}: {reason}")
        layers.carry_over(old, new)
        new.layer_name = name
        parts.replace(old, new)
    try:
        fuse_named(parts.root, manifest.fused)
        restore.fold_named(parts.root, manifest.folded)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return parts.root


def _build_empty(layer: Layer, where: str) -> QuantizedLinear | ConvLayer:
    kinds = registered_kinds()
    if layer.module not in kinds:
        raise CheckpointError(f"{where}: module {layer.module!r} is unknown; known: {', '.join(kinds)}")
    try:
        module: QuantizedLinear | ConvLayer = kinds[layer.module](**layer.config, device="meta")
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{where}: {layer.module} cannot be built from its config: {error}") from error
    if module.config() != layer.config:
        raise CheckpointError(f"{where}: the config is not one that {layer.module} writes: {layer.config}")
    return module


def _settle_what_calls_left(model: nn.Module, places: dict[str, Slot], manifest: Manifest) -> None:
    """Tensors that a call had left on a module, beside the state that a fresh one has: where it has None or a number
    now they get a place, where it has no such attribute the next call makes it again.
    """
    modules = dict(model.named_modules())
    left = [name for name, stored in manifest.tensors.items() if stored.kind == "attribute" and name not in places]
    for name in left:
        owner, _, attribute = name.rpartition(".")
        module = modules.get(owner)
        if module is None or attribute in _INTERNAL:
            continue
        if not hasattr(module, attribute):
            del manifest.tensors[name]
            manifest.tied = {alias: target for alias, target in manifest.tied.items() if target != name}
        elif isinstance(getattr(module, attribute), (int, float, type(None))):
            places[name] = Slot(module, attribute, "attribute", module.__dict__)


def _check_names(places: dict[str, Slot], manifest: Manifest, path: Path, model: str) -> None:
    """The manifest and the model must have the same names, each with the same shape and a compatible dtype."""
    names = {*manifest.tensors, *manifest.tied}
    missing = [name for name in places if name not in names]
    unexpected = [name for name in sorted(names) if name not in places]
    if missing or unexpected:
        problems = [f"lacks {len(missing)}: {listed(missing)}"] if missing else []
        problems += [f"has {len(unexpected)} unexpected: {listed(unexpected)}"] if unexpected else []
        raise CheckpointError(f"{path}: does not fit {model}: of its tensors the checkpoint {'; it '.join(problems)}")
    for name, slot in places.items():
        stored, there = manifest.tensors[manifest.tied.get(name, name)], slot.held
        if there is None:
            continue
        # A float tensor may have another float dtype than the factory gives it: that of the model that was saved.
        floats = stored.dtype.is_floating_point and there.dtype.is_floating_point
        fits = stored.dtype == there.dtype or (floats and not _is_fixed(slot))
        if stored.shape != tuple(there.shape) or not fits:
            held, needed = (f"{each.dtype} {list(each.shape)}" for each in (stored, there))
            raise CheckpointError(f"{path}: tensor {name!r} is {held}, {model} needs {needed}")


def _check_values(slot: Slot, name: str, tensor: torch.Tensor, path: Path) -> None:
    """Scales of quantised weights must be finite: one NaN would silently poison a whole output channel."""
    scale = _is_fixed(slot) and slot.kind != "parameter" and tensor.is_floating_point()
    if scale and not torch.isfinite(tensor).all():
        raise CheckpointError(f"{path}: tensor {name!r} holds a scale that is NaN or Inf")
    if isinstance(slot.module, layers.CONVERTED) and (reason := slot.module.why_bad_buffer(slot.attribute, tensor)):
        raise CheckpointError(f"{path}: tensor {name!r} is no 2:4 pattern: {reason}")
    if slot.attribute == "weight_values":
        return
    if scale and isinstance(slot.module, ConvLayer) and not (tensor > 0).all():
        raise CheckpointError(f"{path}: tensor {name!r} holds a scale that is not positive")


def _is_fixed(slot: Slot) -> bool:
    """Whether the module at a place works with one dtype only."""
    if isinstance(slot.module, ConvLayer):
        return slot.kind != "parameter" or slot.attribute == "bias"
    return isinstance(slot.module, QuantizedLinear) and slot.kind != "parameter"


def _put_in(places: dict[str, Slot], manifest: Manifest, loaded: dict[str, torch.Tensor]) -> None:
    """Put every tensor in its place; tied places get the same object."""
    for name in [*manifest.tensors, *manifest.tied]:
        target = manifest.tied.get(name, name)
        if places[name].kind == "parameter" and not isinstance(loaded[target], nn.Parameter):
            loaded[target] = nn.Parameter(loaded[target], requires_grad=manifest.tensors[target].requires_grad)
    for name, slot in places.items():
        slot.put(loaded[manifest.tied.get(name, name)])
