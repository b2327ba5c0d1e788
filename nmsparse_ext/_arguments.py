"""Checks of the public functions' arguments: ``TypeError`` and ``ValueError`` before anything runs.

Each names the argument, what came and what is allowed. The first parameter of most is the argument's name.
``_checks.py`` repeats the checks for callers of ``torch.ops.nmsparse``, in terms of the op's arguments.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ._checks import MAX_DIMS, WEIGHT_DTYPES, bits_shape, index_row_bytes
from .pattern import Pattern


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_path(name: str, path: object) -> str:
    """The path as text."""
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise TypeError(
            f"{name} must be a path (str or os.PathLike), got {path!r} of type {type(path).__name__}"
        )
    return text


def check_state(name: str, state: Mapping[str, object], error: type[Exception] = TypeError) -> None:
    """Checks that a state dict holds tensors by name, and nothing else.

    Args:
        name: The argument's name.
        state: The state dict.
        error: What is raised; another one where the caller's argument is of the right type, as a model is.
    """
    nameless = [repr(key) for key in state if not isinstance(key, str)]
    if nameless:
        raise error(f"{name} must have names (str) as keys, got {_some(nameless)}")
    strange = [
        f"{key} of type {type(value).__name__}"
        for key, value in state.items()
        if not isinstance(value, Tensor)
    ]
    if strange:
        raise error(f"{name} must hold tensors only, got {_some(strange)}")


def _some(listed: list[str]) -> str:
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def state_of(name: str, value: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a model, with the parameters themselves, or that of a mapping; checked."""
    if isinstance(value, nn.Module):
        state = value.state_dict(keep_vars=True)
        check_state(name, state, ValueError)  # a model it is, but with extra state
        return state
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be an nn.Module or a mapping of tensors, got {type(value).__name__}")
    check_state(name, value)
    return dict(value)


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        raise TypeError(f"{name} must be one of {', '.join(map(str, allowed))}, got {tensor.dtype}")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")


def check_same_device(name: str, tensor: Tensor, w_name: str, w: Tensor) -> None:
    if tensor.device != w.device:
        raise ValueError(f"{name} must be on the device of {w_name}, {w.device}, got {tensor.device}")


def check_same_shape(name: str, tensor: Tensor, w_name: str, w: Tensor) -> None:
    if tensor.shape != w.shape:
        raise ValueError(f"{name} must have the shape of {w_name}, {list(w.shape)}, got {list(tensor.shape)}")


def check_writable(name: str, tensor: Tensor) -> None:
    # An empty channels_last tensor has strides of 0 too.
    if tensor.numel() > 0 and any(
        stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        raise ValueError(
            f"{name} is written to, but several of its elements share one memory location "
            f"(shape {list(tensor.shape)}, strides {list(tensor.stride())}); pass a clone"
        )


def check_bits(name: str, bits: Tensor, shape: torch.Size, dim: int) -> None:
    check_tensor(name, bits)
    check_dtype(name, bits, (torch.uint8,))
    expected = bits_shape(shape, dim)
    if list(bits.shape) != expected:
        raise ValueError(
            f"{name} must have shape {expected} for a weight of shape {list(shape)} and dim {dim}, "
            f"got {list(bits.shape)}"
        )
    if not bits.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(bits.stride())}")


def check_dims(name: str, tensor: Tensor) -> None:
    if not 1 <= tensor.dim() <= MAX_DIMS:
        raise ValueError(f"{name} must have 1 to {MAX_DIMS} dimensions, got {tensor.dim()}")


def normalize_dim(name: str, ndim: int, dim: int) -> int:
    """``dim`` as an index from the front; for one dimension the default 1 means 0."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {dim!r} of type {type(dim).__name__}")
    if ndim == 1 and dim == 1:
        return 0
    if not -ndim <= dim < ndim:
        raise ValueError(f"dim must be in [{-ndim}, {ndim - 1}] for {name} with {ndim} dimensions, got {dim}")
    return dim % ndim


def check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"k must be an int >= 0, got {k!r}")
    if k < 0:
        raise ValueError(f"k must be an int >= 0, got {k}")


def check_weight(w: Tensor, dim: int) -> int:
    """Checks a dense weight; returns the normalised dim."""
    check_tensor("w", w)
    if w.layout != torch.strided:
        raise TypeError(f"w must be a dense (torch.strided) tensor, got {w.layout}")
    check_dtype("w", w, WEIGHT_DTYPES)
    check_dims("w", w)
    return normalize_dim("w", w.dim(), dim)


def check_remainder(k: int, m: int, remainder: str, what: str) -> bool:
    """Whether to pad. Refuses a remainder that was not asked for."""
    check_choice("remainder", remainder, ("error", "pad"))
    pad = remainder == "pad"
    if not pad and k % m != 0:
        raise ValueError(
            f"w has {k} weights {what}, no multiple of m = {m}; pass remainder='pad' to allow it"
        )
    return pad


def check_grouping(
    w: Tensor, pattern: Pattern | str, dim: int, remainder: str, grouping: str = "channel"
) -> tuple[int, int, int, bool]:
    """Checks what every grouping function takes; returns the op's ``n, m, dim, pad``."""
    dim = check_weight(w, dim)
    p = Pattern.parse(pattern)
    check_choice("grouping", grouping, ("channel", "flat"))
    if grouping == "flat":
        return p.n, p.m, 0, check_remainder(w.numel(), p.m, remainder, "when flattened")
    return p.n, p.m, dim, check_remainder(w.shape[dim], p.m, remainder, f"along dim {dim}")


def check_out(w: Tensor, out: Tensor) -> None:
    check_tensor("out", out)
    check_dtype("out", out, (w.dtype,))
    check_same_shape("out", out, "w", w)
    check_same_device("out", out, "w", w)
    check_writable("out", out)
    if torch.is_grad_enabled() and (w.requires_grad or out.requires_grad):
        raise ValueError(
            "out cannot be given where gradients are recorded; leave it away or use torch.no_grad()"
        )
    # A traced graph has no addresses to compare; there, memory planning keeps different tensors apart.
    if not torch.compiler.is_compiling() and out is not w and _overlaps_partly(w, out):
        raise ValueError(
            "out overlaps w (or interleaves with it) in memory; pass w itself or separate memory"
        )


def _overlaps_partly(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype and shape share memory other than element for element.

    Compares address ranges, so tensors that interleave without a common element count as well.
    """
    if a.numel() == 0 or a.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return False
    if a.storage_offset() == b.storage_offset() and a.stride() == b.stride():
        return False

    def span(t: Tensor) -> tuple[int, int]:
        first = int(t.storage_offset())
        return first, first + sum(
            (size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)
        )

    (a_first, a_last), (b_first, b_last) = span(a), span(b)
    return a_first <= b_last and b_first <= a_last


def check_in_place(name: str, tensor: Tensor) -> None:
    check_writable(name, tensor)
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise ValueError(f"{name} requires grad and cannot be pruned in place; use torch.no_grad()")


def check_masks(a_name: str, a: Tensor, b_name: str, b: Tensor) -> None:
    for name, mask in ((a_name, a), (b_name, b)):
        check_tensor(name, mask)
        check_dtype(name, mask, (torch.bool, torch.uint8))
    if a.dtype != b.dtype:
        raise TypeError(
            f"{a_name} and {b_name} must both be bool masks or both be packed bits, "
            f"got {a.dtype} and {b.dtype}"
        )
    check_same_shape(b_name, b, a_name, a)
    check_same_device(b_name, b, a_name, a)


def check_indices(indices: Tensor, p: Pattern, k: int) -> None:
    check_tensor("indices", indices)
    check_dtype("indices", indices, (torch.uint8,))
    check_dims("indices", indices)
    check_k(k)
    row_bytes = index_row_bytes(p.n, p.m, k)
    if indices.shape[-1] != row_bytes:
        raise ValueError(
            f"indices must have {row_bytes} bytes a row for {p} and k = {k}, got {indices.shape[-1]}"
        )
