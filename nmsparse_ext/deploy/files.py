"""Packed models in safetensors files. What stands in a file is described in ``docs/format.md``.

Writing is atomic. Reading checks everything that a file claims, and every index, before a kernel sees it;
whatever is wrong is a `FormatError` that names the tensor. Tensors of a loaded file are mapped, not read:
pages come from the disk when they are used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._arguments import check_path, state_of
from ..errors import FormatError
from ..pattern import Pattern
from ..scheme import Scheme, as_scheme
from ..tensor import KEEPS, Keep, NMTensor, compress
from ..weights import canonical_name, prunable_weights
from .detect import detect_pattern
from .format import PackedEntry
from .listeners import announce_packed
from .shards import locate, parse_size, read_stored, write_model
from .stored import layout, unlayout
from .support import engine_for, why_not_packed

StrPath = str | os.PathLike[str]


def save_file(
    model: nn.Module | Mapping[str, Tensor],
    path: StrPath,
    scheme: Scheme | Mapping[str, Pattern | str] | Pattern | str | None = None,
    *,
    max_shard_size: int | str | None = None,
) -> None:
    """Saves a model, its sparse weights packed.

    Weights that are packed already are stored as they are. Dense ones that satisfy their pattern are packed
    on the way out (the model itself is not touched); everything else is stored dense. Tied tensors are stored
    once. The model appears in one step: whoever reads ``path`` finds the old one or the new one, also after a
    crash. Shards of an older model of that name are deleted when the new one is complete.

    Args:
        model: The model, or its tensors ``{name: Tensor or NMTensor}``. Without a model nobody knows which
            dim of a dense weight is grouped, so only what is packed already is stored packed.
        path: The file, usually ``*.safetensors``; replaced if it exists.
        scheme: Patterns of the dense weights. ``None`` detects: see `deploy.detect_pattern`.
        max_shard_size: Bytes of tensors that a file may have, or text such as ``"5GB"`` (10^9 bytes each) or
            ``"5GiB"``. A model with more is written to ``model-00001-of-00003.safetensors`` and so on, beside
            ``path``, with an index ``model.safetensors.index.json``, as Hugging Face names them; ``path``
            itself does not exist then, but `load_file` takes it. ``None``: one file. Only one process may
            write shards to a place at a time.

    Raises:
        TypeError: If an argument is of the wrong type, or a mapping holds what is no tensor.
        ValueError: If a weight violates the pattern that ``scheme`` gives it, if the model holds what
            safetensors cannot (extra state that is no tensor, sparse or meta tensors), or if two names
            collide in the file.
        OSError: If the file cannot be written; `FileNotFoundError` if its folder does not exist.
    """
    target = check_path("path", path)
    tensors = _tensors(model)
    if isinstance(model, nn.Module):
        tensors |= _packed(model, tensors, scheme)
    elif scheme is not None:
        raise TypeError("scheme needs a model: a mapping of tensors does not say which dims are grouped")
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    write_model(target, *layout(tensors), limit)


def load_file(path: StrPath) -> dict[str, Tensor]:
    """Reads a file that `save_file` (or any other safetensors writer) has written.

    Args:
        path: The file, the index of a model in shards, a folder that holds either, or the path that shards
            were saved under. In a folder ``model.safetensors`` comes before its index, and both before files
            of other names.

    Returns:
        ``{name: tensor}`` on the CPU: an `NMTensor` for each packed weight, a plain tensor for the rest. Tied
        names share one tensor.

    Raises:
        FormatError: If a file is damaged, truncated, of an unknown version, or contradicts itself or the
            index. The message names the file, the tensor and the reason.
        OSError: If the file cannot be opened.
    """
    return _load(path, None)


def _load(path: StrPath, engine: str | None) -> dict[str, Tensor]:
    """Reads a model; packed weights get that engine."""
    source = check_path("path", path)
    try:
        return unlayout(*read_stored(locate(source)), engine=engine)
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # Whatever PyTorch finds wrong with what the metadata describes.
        raise FormatError(f"{source}: no valid model: {error}") from error


def load_into(model: nn.Module, path: StrPath, *, keep: Keep | None = None) -> nn.Module:
    """Loads a file into a model of the same architecture.

    Afterwards the model holds what the file holds: weights that are packed there are packed (and frozen) in
    the model, without a dense copy in between; the others are dense, and so are weights of modules that
    cannot multiply with a packed one (embeddings, recurrent layers). Values take the dtype and the device
    that the model's parameter had; parameters on the meta device take the file's. Tied parameters stay tied.

    Args:
        model: The model; changed in place.
        path: What `load_file` takes.
        keep: ``"both"`` or ``"engine"``: what packed weights hold, see `NMTensor.keep`. ``None`` goes by the
            weights that were in their places, and holds both where those were dense.

    Returns:
        ``model``.

    Raises:
        FormatError: As `load_file`.
        ValueError: If names or shapes of the file and the model differ; all of them are named, and the model
            is left as it was.
        OSError: If the file cannot be opened.
    """
    if keep is not None and keep not in KEEPS:
        raise ValueError(f"keep must be None or one of {KEEPS}, got {keep!r}")
    loaded = _load(path, "decompress")  # the engine's form is made once, in the place where it stays
    slots = _slots(model)
    problems = [f"the file has no {name}" for name in slots if name not in loaded]
    problems += [f"the model has no {name}" for name in loaded if name not in slots]
    for name in slots.keys() & loaded.keys():
        if tuple(slots[name].tensor.shape) != tuple(loaded[name].shape):
            problems.append(
                f"{name} has shape {list(slots[name].tensor.shape)} in the model, "
                f"{list(loaded[name].shape)} in the file"
            )
        elif isinstance(loaded[name], NMTensor) and not slots[name].is_parameter:
            problems.append(f"{name} is packed in the file, but a buffer in the model")
    problems += _untied(slots, loaded)
    if problems:
        raise ValueError(f"{os.fspath(path)} does not match the model:\n  " + "\n  ".join(sorted(problems)))
    dense_only = {
        id(loaded[name]) for name, slot in slots.items() if why_not_packed(slot.module, slot.tensor)
    }
    done: dict[tuple[int, int], Tensor] = {}
    for name, slot in slots.items():
        # Names that are one parameter in the model, or one tensor in the file, stay one.
        key = (id(slot.tensor), id(loaded[name]))
        if key not in done:
            new = loaded[name]
            if isinstance(new, NMTensor) and id(new) in dense_only:
                new = new.to_dense()
            done[key] = _filled(slot, new, keep)
        slot.put(done[key])
    announce_packed(model)
    return model


# ---------------------------------------------------------------------------------------------------- writing


def _tensors(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All that is to be saved, with the parameters themselves (not copies), so that tied ones can be told."""
    tensors = state_of("model", model)
    if isinstance(model, nn.Module):
        # Wrappers (DDP, torch.compile) put prefixes before names: a file serves the wrapped model and the
        # plain one.
        tensors = _renamed(tensors)
    for name, tensor in tensors.items():
        if isinstance(tensor, NMTensor):
            continue
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            kind = f"{tensor.layout} {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name} cannot be saved: it must be an ordinary dense tensor, not {kind}")
        if is_traceable_wrapper_subclass(tensor):
            raise ValueError(
                f"{name} cannot be saved: it is a {type(tensor).__name__}, whose parts lie elsewhere. Save "
                "plain tensors or NMTensors; of a sharded model the gathered ones"
            )
    return tensors


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if renamed.setdefault(canonical_name(name), tensor) is not tensor:
            raise ValueError(f"{name} has the same name as another tensor once wrapper prefixes are dropped")
    return renamed


def _packed(
    model: nn.Module,
    tensors: dict[str, Tensor],
    scheme: Scheme | Mapping[str, Pattern | str] | Pattern | str | None,
) -> dict[str, Tensor]:
    """Packed stand-ins for the dense weights that hold a pattern, by state dict name."""
    patterns: dict[int, tuple[str, int, Pattern]] = {}
    if scheme is None:
        for weight in prunable_weights(model):
            if isinstance(weight.parameter, NMTensor) or weight.group_dim is None:
                continue
            fits = lambda pattern, weight=weight: weight.misfit(pattern) is None  # noqa: E731
            found = detect_pattern(weight.parameter.detach(), dim=weight.group_dim, allowed=fits)
            if found is not None:
                patterns[id(weight.parameter)] = (weight.name, weight.group_dim, found)
    else:
        for name, resolved in as_scheme(scheme, model).resolve(model).items():
            if not isinstance(resolved.parameter, NMTensor):
                patterns[id(resolved.parameter)] = (name, resolved.group_dim, resolved.pattern)
    packed: dict[int, Tensor] = {}
    for key, tensor in {id(tensor): tensor for tensor in tensors.values()}.items():
        if key in patterns:
            name, group_dim, pattern = patterns[key]
            try:
                packed[key] = compress(tensor.detach(), pattern, dim=group_dim)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    return {name: packed[id(tensor)] for name, tensor in tensors.items() if id(tensor) in packed}


# ---------------------------------------------------------------------------------------------------- reading


class _Slot:
    """One entry of a model's state dict, and the place it can be replaced at."""

    def __init__(self, module: nn.Module, attr: str, tensor: Tensor, is_parameter: bool) -> None:
        self.module, self.attr, self.tensor, self.is_parameter = module, attr, tensor, is_parameter

    def put(self, tensor: Tensor) -> None:
        if tensor is not self.tensor:
            setattr(self.module, self.attr, tensor)


def _slots(model: nn.Module) -> dict[str, _Slot]:
    slots: dict[str, _Slot] = {}
    for name, slot in _iter_slots(model):
        if slots.setdefault(canonical_name(name), slot) is not slot:
            raise ValueError(f"{name} has the same name as another tensor once wrapper prefixes are dropped")
    return slots


def _untied(slots: Mapping[str, _Slot], loaded: dict[str, Tensor]) -> Iterator[str]:
    """Gives all names of a tied tensor what the file has under the first; yields where the others differ."""
    first: dict[int, str] = {}
    for name, slot in slots.items():
        other = first.setdefault(id(slot.tensor), name)
        if name in loaded and other in loaded and loaded[name] is not loaded[other]:
            if not _same(loaded[name], loaded[other]):
                yield f"{other} and {name} are one tensor in the model, but differ in the file"
            loaded[name] = loaded[other]


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of a file have equal contents; NaN equals itself."""
    if isinstance(a, NMTensor) or isinstance(b, NMTensor):
        return (
            isinstance(a, NMTensor)
            and isinstance(b, NMTensor)
            and PackedEntry.of(a) == PackedEntry.of(b)
            and _same(a.values, b.values)
            and _same(a.indices, b.indices)
        )
    same_kind = (a.dtype, a.shape) == (b.dtype, b.shape)
    return same_kind and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _iter_slots(model: nn.Module) -> Iterator[tuple[str, _Slot]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for attr, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield dot + attr, _Slot(module, attr, parameter, True)
        for attr, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if attr not in module._non_persistent_buffers_set:
                yield dot + attr, _Slot(module, attr, buffer, False)


@torch.no_grad()
def _filled(slot: _Slot, new: Tensor, keep: Keep | None) -> Tensor:
    """What takes the place of a tensor, with the contents of ``new``; if both are dense, that tensor."""
    old = slot.tensor
    if not isinstance(new, NMTensor) and not isinstance(old, NMTensor) and not old.is_meta:
        return old.copy_(new)
    if not old.is_meta:
        new = new.to(device=old.device, dtype=old.dtype)
    if isinstance(new, NMTensor):
        # The best one where it is now; held as the weight in its place was.
        chosen = engine_for(slot.module, new)
        alone = keep == "engine" if keep is not None else isinstance(old, NMTensor) and old.keep == "engine"
        new = new.with_engine(chosen.name, keep="engine" if alone and chosen.restore is not None else "both")
    if not slot.is_parameter:
        return new
    trainable = not isinstance(new, NMTensor) and old.requires_grad and new.is_floating_point()
    return nn.Parameter(new, requires_grad=trainable)
