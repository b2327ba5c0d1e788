"""What a model's tensors look like inside a file, and what a file's tensors mean.

`layout` turns ``{name: Tensor or NMTensor}`` into the plain tensors that are stored and the description of
them (``format.py``); `unlayout` puts the packed weights together again, checking every part.
"""

from __future__ import annotations

from torch import Tensor

from ..engines import portable
from ..errors import FormatError
from ..tensor import NMTensor, inner_tensors
from .format import INDICES, VALUES, Contents, PackedEntry


def layout(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Contents]:
    """What goes into the file: plain contiguous tensors without shared memory, and what they mean."""
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    contents = Contents()
    first: dict[tuple, str] = {}
    for name, tensor in tensors.items():
        key = identity(tensor)
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


def identity(tensor: Tensor) -> tuple | None:
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


def aligned(tensor: Tensor) -> Tensor:
    """The tensor where its elements start at multiples of their size, as kernels may count on; else a copy.

    Mapped files give any address: their writer, or whoever damaged them, chose the offsets.

    Args:
        tensor: Plain, on the CPU, of any shape and dtype.
    """
    return tensor.clone() if tensor.numel() and tensor.data_ptr() % tensor.itemsize else tensor


def unlayout(
    stored: dict[str, Tensor], contents: Contents, *, engine: str | None = None
) -> dict[str, Tensor]:
    """Puts the packed weights together; every tensor of the file must have a meaning, and only one.

    Args:
        stored: The plain tensors; those of packed weights are taken out.
        contents: What they mean.
        engine: The engine that packed weights get, see `NMTensor.from_packed`.

    Raises:
        FormatError: If the two do not fit together.
    """
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
                engine=engine,
            )
        except (TypeError, ValueError) as error:
            raise FormatError(f"weight {name!r}: {error}") from None
    for name, tensor in stored.items():
        if name in loaded:
            raise FormatError(f"{name!r} is stored both packed and dense")
        loaded[name] = tensor
    for alias, name in contents.aliases.items():
        if name in contents.aliases:
            raise FormatError(f"alias {alias!r} points to {name!r}, which is an alias itself")
        if alias in loaded:
            raise FormatError(f"{alias!r} is both a tensor and an alias of {name!r}")
        if name not in loaded:
            raise FormatError(f"alias {alias!r} points to {name!r}, which the file does not have")
    for alias, name in contents.aliases.items():
        loaded[alias] = loaded[name]
    return loaded
