"""Packed models in safetensors files. What stands in a file is described in ``format.py``.

Writing is atomic. Reading checks everything that a file claims, and every index, before a kernel sees it;
whatever is wrong is a `FormatError` that names the tensor. Tensors of a loaded file are mapped, not read:
pages come from the disk when they are used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file as write_safetensors
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._atomic import atomic_write
from ..engines import portable
from ..errors import FormatError
from ..pattern import Pattern
from ..scheme import Scheme, as_scheme
from ..tensor import KEEPS, Keep, NMTensor, compress, inner_tensors
from ..weights import canonical_name, prunable_weights
from .detect import detect_pattern
from .format import INDICES, VALUES, Contents, PackedEntry, parse_metadata
from .listeners import announce_packed
from .support import engine_for, why_not_packed

StrPath = str | os.PathLike[str]


def save_file(
    model: nn.Module | Mapping[str, Tensor],
    path: StrPath,
    scheme: Scheme | Mapping[str, Pattern | str] | Pattern | str | None = None,
) -> None:
    """Saves a model, its sparse weights packed.

    Weights that are packed already are stored as they are. Dense ones that satisfy their pattern are packed
    on the way out (the model itself is not touched); everything else is stored dense. Tied tensors are stored
    once. The file
    appears in one step: whoever reads ``path`` finds the old file or the new one, also after a crash.

    Args:
        model: The model, or its tensors ``{name: Tensor or NMTensor}``. Without a model nobody knows which
            dim of a dense weight is grouped, so only what is packed already is stored packed.
        path: The file, usually ``*.safetensors``; replaced if it exists.
        scheme: Patterns of the dense weights. ``None`` detects: see `deploy.detect_pattern`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a weight violates the pattern that ``scheme`` gives it, if the model holds what
            safetensors cannot (extra state that is no tensor, sparse or meta tensors), or if two names
            collide in the file.
        OSError: If the file cannot be written.
    """
    tensors = _tensors(model)
    if isinstance(model, nn.Module):
        tensors |= _packed(model, tensors, scheme)
    elif scheme is not None:
        raise TypeError("scheme needs a model: a mapping of tensors does not say which dims are grouped")
    stored, contents = _layout(tensors)
    with atomic_write(path) as file:
        write_safetensors(stored, file.name, contents.to_metadata())


def load_file(path: StrPath) -> dict[str, Tensor]:
    """Reads a file that `save_file` (or any other safetensors writer) has written.

    Args:
        path: The file.

    Returns:
        ``{name: tensor}`` on the CPU: an `NMTensor` for each packed weight, a plain tensor for the rest. Tied
        names share one tensor.

    Raises:
        FormatError: If the file is damaged, truncated, of an unknown version, or contradicts itself. The
            message names the file, the tensor and the reason.
        OSError: If the file cannot be opened.
    """
    with open(path, "rb"):  # so that a missing or forbidden file is an OSError, and no format error
        pass
    try:
        with safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            contents = parse_metadata(file.metadata())
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return _unlayout(stored, contents)
    except FormatError as error:
        raise FormatError(f"{os.fspath(path)}: {error}") from None
    except (
        SafetensorError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        # Whatever safetensors or PyTorch find wrong with tensors that the header describes.
        raise FormatError(f"{os.fspath(path)}: no valid safetensors file: {error}") from error


def load_into(model: nn.Module, path: StrPath, *, keep: Keep | None = None) -> nn.Module:
    """Loads a file into a model of the same architecture.

    Afterwards the model holds what the file holds: weights that are packed there are packed (and frozen) in
    the model, without a dense copy in between; the others are dense, and so are weights of modules that
    cannot multiply with a packed one (embeddings, recurrent layers). Values take the dtype and the device
    that the model's parameter had; parameters on the meta device take the file's. Tied parameters stay tied.

    Args:
        model: The model; changed in place.
        path: The file.
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
    loaded = load_file(path)
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
    if isinstance(model, nn.Module):
        # Wrappers (DDP, torch.compile) put prefixes before names: a file serves the wrapped model and the
        # plain one.
        tensors = _renamed(model.state_dict(keep_vars=True))
    elif isinstance(model, Mapping):
        tensors = dict(model)
    else:
        raise TypeError(f"model must be an nn.Module or a mapping of tensors, got {type(model).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name} is of type {type(tensor).__name__}, and safetensors files hold tensors only"
            )
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


def _layout(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Contents]:
    """What goes into the file: plain contiguous tensors without shared memory, and what they mean."""
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    contents = Contents()
    first: dict[tuple, str] = {}
    for name, tensor in tensors.items():
        key = _identity(tensor)
        if key is not None and key in first:
            contents.aliases[name] = first[key]
            continue
        if key is not None:
            first[key] = name
        if isinstance(tensor, NMTensor):
            contents.weights[name] = PackedEntry.of(tensor)
            values, indices = portable(tensor)
            parts = {name + VALUES: values, name + INDICES: indices}
        else:
            parts = {name: tensor}
        for part_name, part in parts.items():
            if part_name in stored:
                raise ValueError(f"two tensors would be stored as {part_name}; rename one")
            stored[part_name] = _storable(part.detach(), storages)
    taken = [name for name in contents.aliases if name in stored]
    taken += [name for name in contents.weights if name in stored]
    if taken:
        raise ValueError(f"two tensors would be stored as {', '.join(taken)}; rename one")
    return stored, contents


def _identity(tensor: Tensor) -> tuple | None:
    """Equal for two names of one tensor; ``None`` where there is no memory to tell by."""
    # The inner tensor that is there in any case: values that are made when asked for have a new address.
    part = inner_tensors(tensor)[0] if isinstance(tensor, NMTensor) else tensor
    if part.numel() == 0:
        return None
    layout = (tuple(part.shape), part.stride(), part.is_conj(), part.is_neg())
    place = (part.data_ptr(), str(part.device), part.dtype, *layout)
    return (*place, PackedEntry.of(tensor)) if isinstance(tensor, NMTensor) else place


def _storable(tensor: Tensor, storages: set[int]) -> Tensor:
    """On the CPU, contiguous, and with memory of its own: safetensors refuses views of one another.

    Conjugation and negation, which PyTorch only notes down at first, are carried out: memory is saved.

    Args:
        tensor: What is to be stored.
        storages: Addresses of the memory taken so far; the result's is added.
    """
    tensor = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    storage = tensor.untyped_storage()
    if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
        tensor = tensor.clone()
    if tensor.numel():
        storages.add(tensor.untyped_storage().data_ptr())
    return tensor


# ---------------------------------------------------------------------------------------------------- reading


def _unlayout(stored: dict[str, Tensor], contents: Contents) -> dict[str, Tensor]:
    """Puts the packed weights together; every tensor of the file must have a meaning, and only one."""
    loaded: dict[str, Tensor] = {}
    for name, entry in contents.weights.items():
        parts = []
        for suffix in (VALUES, INDICES):
            part = stored.pop(name + suffix, None)
            if part is None:
                raise FormatError(f"weight {name!r} has no tensor {name + suffix!r}")
            parts.append(part)
        values, indices = parts
        if values.dtype != entry.dtype:
            raise FormatError(
                f"weight {name!r}: values are {values.dtype}, but the metadata says {entry.dtype}"
            )
        try:
            loaded[name] = NMTensor.from_packed(
                values,
                indices,
                entry.pattern,
                group_dim=entry.group_dim,
                shape=entry.shape,
                remainder=entry.remainder,
            )
        except (TypeError, ValueError) as error:
            raise FormatError(f"weight {name!r}: {error}") from None
    for name, tensor in stored.items():
        if name in loaded:
            raise FormatError(f"{name!r} is stored both packed and dense")
        loaded[name] = tensor
    for alias, name in contents.aliases.items():
        if alias in loaded:
            raise FormatError(f"{alias!r} is both a tensor and an alias of {name!r}")
        if name not in loaded:
            raise FormatError(f"alias {alias!r} points to {name!r}, which the file does not have")
    for alias, name in contents.aliases.items():
        loaded[alias] = loaded[name]
    return loaded


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
