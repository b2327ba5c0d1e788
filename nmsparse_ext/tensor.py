"""``NMTensor``: the packed N:M weight, as a tensor that takes the place of the dense one.

This file holds the class, how to make one, and how it is copied and saved. What PyTorch functions do with it
is in ``_tensor_functions.py``; how it is multiplied is in ``engines.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from ._checks import WEIGHT_DTYPES, holds_data
from .engines import ENGINES, Engine, best_engine, find_engine, unpack
from .pattern import Pattern

Remainder = ops.Remainder
REMAINDERS: tuple[Remainder, ...] = ("error", "pad")


class NMTensor(torch.Tensor):
    """A weight in packed N:M form: of each group of m, the n kept values and where they stood.

    It has the shape, dtype and device of the dense weight, and stands in for it in ``F.linear``, convolutions
    and matrix products; so an ordinary ``nn.Linear`` or ``nn.Conv2d`` runs with it unchanged. Whatever it
    cannot do raises ``NotImplementedError`` with the name of the operation: nothing turns it into a dense
    tensor behind your back. Its
    weights are frozen: gradients reach the input and the bias.

    Make one with `compress`, or with `from_packed` from parts that came from elsewhere. To change one,
    ``copy_`` a weight into it: what the engine multiplies with is derived from ``values`` and ``indices``,
    and does not follow when those are written to.

    Attributes:
        values: The kept weights, ``[other dims..., groups * n]``, in group order.
        indices: Where they stood, uint8 ``[other dims..., ceil(groups * bits / 8)]``.
        encoding: ``"index"`` or ``"bitmask"``: how ``indices`` says it. Follows from the pattern.
        pattern: The `Pattern`.
        group_dim: The dim of the dense weight that groups run along.
        remainder: ``"pad"`` if its size may be no multiple of m, else ``"error"``.
        engine: Name of the engine that multiplies with it (see ``engines.py``).
        nbytes: Bytes of ``values`` and ``indices``. What the engine needs on top is `engine_nbytes`.
    """

    packed_values: Tensor
    packed_indices: Tensor
    pattern: Pattern
    group_dim: int
    batch: tuple[int, ...]  # sizes of leading dims that are broadcast: matmul expands a 2-D weight to batches
    k: int  # size of group_dim; kept because .shape of a subclass takes a trip through __torch_function__
    remainder: Remainder  # type: ignore[assignment]  # a method of torch.Tensor
    engine: str

    # ------------------------------------------------------------------------------------------- construction

    @staticmethod
    def __new__(  # noqa: D102 - see the class
        cls: type[NMTensor],
        values: Tensor,
        indices: Tensor,
        pattern: Pattern,
        group_dim: int,
        shape: torch.Size | tuple[int, ...],
        remainder: Remainder,
        engine: str,
        forms: tuple[Tensor, ...],
    ) -> NMTensor:
        # Checks nothing: it runs for every detach and view. `compress` and `from_packed` are the public
        # doors.
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=values.dtype, device=values.device)
        self.packed_values = values
        self.packed_indices = indices
        self.pattern = pattern
        self.group_dim = group_dim
        self.k = shape[group_dim]
        self.batch = tuple(shape[: len(shape) - values.dim()])
        self.remainder = remainder
        self.engine = engine
        for name, form in zip(find_engine(engine).forms, forms, strict=True):
            setattr(self, f"form_{name}", form)
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # torch.Tensor.__init__ takes no arguments; everything has been set in __new__.
        super().__init__()

    @staticmethod
    def from_packed(
        values: Tensor,
        indices: Tensor,
        pattern: Pattern | str,
        *,
        group_dim: int,
        shape: tuple[int, ...],
        remainder: Remainder = "error",
        engine: str | None = None,
    ) -> NMTensor:
        """Puts a packed weight together from its parts, checking that they fit and every index is legal.

        Args:
            values: ``[other dims..., groups * n]``.
            indices: uint8 ``[other dims..., ceil(groups * bits / 8)]`` on the same device.
            pattern: The pattern, for example ``"2:4"``.
            group_dim: The dim of ``shape`` that groups run along, ``>= 0``.
            shape: Shape of the dense weight.
            remainder: ``"error"`` if ``shape[group_dim]`` must be a multiple of m, ``"pad"`` if not.
            engine: Name of the engine to run it with; ``None`` chooses.

        Returns:
            The weight; it shares the memory of ``values`` and ``indices``.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If the parts contradict each other. The message says which and how.
        """
        pattern = Pattern.parse(pattern)
        shape = tuple(shape)
        _check_parts(values, indices, pattern, group_dim, shape, remainder)
        portable = NMTensor(values, indices, pattern, group_dim, shape, remainder, "decompress", ())
        return portable.with_engine(engine)

    def with_engine(self, engine: str | None) -> NMTensor:
        """Returns the same weight, sharing its values and indices, to be run by another engine.

        Args:
            engine: Name of the engine; ``None`` chooses the best for this device, dtype and pattern.

        Raises:
            ValueError: If there is no such engine, or it cannot run this weight; the message says why.
        """
        chosen = best_engine(self) if engine is None else find_engine(engine)
        reason = chosen.why_not(self)
        if reason is not None:
            raise ValueError(f"engine {chosen.name!r} cannot run this weight: {reason}")
        return self._rebuild(self.packed_values, self.packed_indices, chosen)

    def _rebuild(self, values: Tensor, indices: Tensor, engine: Engine) -> NMTensor:
        """The same layout with other contents; the forms of ``engine`` are built anew."""
        parts = (self.pattern, self.group_dim, self._dense_shape(), self.remainder)
        portable = NMTensor(values, indices, *parts, "decompress", ())
        if not engine.forms:
            portable.engine = engine.name
            return portable
        with torch.no_grad():
            return NMTensor(values, indices, *parts, engine.name, engine.build(portable))

    def _map(self, fn: Callable[[Tensor], Tensor]) -> NMTensor:
        """The same weight with ``fn`` applied to every inner tensor."""
        return NMTensor(
            fn(self.packed_values),
            fn(self.packed_indices),
            self.pattern,
            self.group_dim,
            self._dense_shape(),
            self.remainder,
            self.engine,
            tuple(fn(form) for form in self._forms()),
        )

    def _dense_shape(self) -> tuple[int, ...]:
        with torch._C.DisableTorchFunctionSubclass():
            return tuple(self.shape)

    def _forms(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f"form_{name}") for name in find_engine(self.engine).forms)

    # --------------------------------------------------------------------------------------------- attributes

    # torch.Tensor has methods of these two names, for sparse COO tensors; here they are plain attributes.
    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """The kept weights."""
        return self.packed_values

    @property
    def indices(self) -> Tensor:  # type: ignore[override]
        """Where they stood."""
        return self.packed_indices

    @property
    def encoding(self) -> str:
        """How `indices` says it."""
        return self.pattern.encoding

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of the packed form."""
        return self.packed_values.nbytes + self.packed_indices.nbytes

    @property
    def engine_nbytes(self) -> int:
        """Bytes of the tensors that the engine keeps beside the packed form."""
        return sum(form.nbytes for form in self._forms())

    def to_dense(self, dtype: torch.dtype | None = None, *, masked_grad: bool | None = None) -> Tensor:
        """Returns the dense weight: contiguous, of the same shape; pruned entries are +0.0.

        Args:
            dtype: Dtype of the result; ``None`` keeps it.
            masked_grad: Accepted because ``torch.Tensor.to_dense`` has it; without effect.
        """
        dense = unpack(self)
        return dense if dtype is None else dense.to(dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        dense_bytes = math.prod(self._dense_shape()) * self.packed_values.itemsize
        padded = ", padded" if self.remainder == "pad" else ""
        return (
            f"NMTensor({self.pattern} along dim {self.group_dim}{padded}, shape={list(self._dense_shape())}, "
            f"dtype={self.packed_values.dtype}, device='{self.packed_values.device}', "
            f"{self.nbytes} bytes packed of {dense_bytes} dense, engine={self.engine!r})"
        )

    def __dir__(self) -> list[str]:
        # torch.export asks the first weight that it meets which attributes to follow on all of them, so the
        # forms of every engine are named here.
        forms = (f"form_{name}" for engine in ENGINES.values() for name in engine.forms)
        return sorted({*super().__dir__(), *forms})

    # ------------------------------------------------------------------------------------- copying and saving

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Pattern, int, Remainder, str]]:
        names = [
            "packed_values",
            "packed_indices",
            *(f"form_{name}" for name in find_engine(self.engine).forms),
        ]
        return names, (self.pattern, self.group_dim, self.remainder, self.engine)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor],
        context: tuple[Pattern, int, Remainder, str],
        outer_size: torch.Size,
        outer_stride: object,
    ) -> NMTensor:
        pattern, group_dim, remainder, engine = context
        forms = tuple(inner[f"form_{name}"] for name in find_engine(engine).forms)
        return NMTensor(
            inner["packed_values"],
            inner["packed_indices"],
            pattern,
            group_dim,
            outer_size,
            remainder,
            engine,
            forms,
        )

    def _stable_hash_for_caching(self) -> str:
        """What compiled code may depend on: all but the contents. The caches of torch.compile ask for it."""
        names, context = self.__tensor_flatten__()
        inner = [
            (name, part.dtype, tuple(part.shape), part.stride(), str(part.device), part.requires_grad)
            for name in names
            for part in (getattr(self, name),)
        ]
        return repr(("NMTensor", self._dense_shape(), context, inner))

    def __reduce_ex__(self, protocol: object) -> tuple[Callable[..., Tensor], tuple]:
        # Engine forms are derived, so they are not saved. Everything else is plain tensors and builtins, so
        # that torch.load(weights_only=True) needs to trust one name only, which checks what it is given.
        state = (
            self.packed_values,
            self.packed_indices,
            str(self.pattern),
            self.group_dim,
            self._dense_shape(),
            self.remainder,
            self.engine,
            getattr(self, "_is_param", False),
        )
        return _from_pickle, state

    def share_memory_(self) -> NMTensor:
        """Not supported.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "NMTensor does not support share_memory_(): its parts are separate tensors. Share .values and "
            ".indices and put them together with NMTensor.from_packed, or share .to_dense()"
        )

    # ----------------------------------------------------------------------------------------------- dispatch

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: tuple[type, ...], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = FUNCTIONS.get(func)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: tuple[type, ...], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = OPS.get(func)
        if handler is None:
            raise NotImplementedError(
                f"NMTensor does not support {func}. Packed weights are for linear layers, convolutions and "
                "matrix products; for anything else, work on .to_dense()"
            )
        return handler(func, *args, **(kwargs or {}))


# What PyTorch functions do with an NMTensor: public functions (above autograd), and ATen ops (below it) for
# whoever does not come through those. Filled by _tensor_functions.py.
FUNCTIONS: dict[Callable, Callable] = {}
OPS: dict[Any, Callable] = {}


def _check_parts(
    values: Tensor,
    indices: Tensor,
    pattern: Pattern,
    group_dim: int,
    shape: tuple[int, ...],
    remainder: Remainder,
) -> None:
    """Raises unless the parts make one packed weight; see `NMTensor.from_packed`."""
    for name, part in (("values", values), ("indices", indices)):
        if not isinstance(part, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(part).__name__}")
    if values.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"values must be one of {', '.join(map(str, WEIGHT_DTYPES))}, got {values.dtype}")
    if indices.dtype != torch.uint8:
        raise TypeError(f"indices must be torch.uint8, got {indices.dtype}")
    if indices.device != values.device:
        raise ValueError(f"indices must be on the device of values, {values.device}, got {indices.device}")
    if not 1 <= len(shape) <= 5 or any(size < 0 for size in shape):
        raise ValueError(f"shape must have 1 to 5 non-negative sizes, got {shape}")
    if not 0 <= group_dim < len(shape):
        raise ValueError(f"group_dim must be in [0, {len(shape)}) for shape {shape}, got {group_dim}")
    if remainder not in REMAINDERS:
        raise ValueError(f"remainder must be one of {REMAINDERS}, got {remainder!r}")
    k = shape[group_dim]
    if remainder == "error" and k % pattern.m:
        raise ValueError(
            f"size {k} of group dim {group_dim} is no multiple of m = {pattern.m}, and remainder is 'error'"
        )
    rows = [*shape[:group_dim], *shape[group_dim + 1 :]]
    groups = pattern.groups(k)
    wanted = [*rows, groups * pattern.n]
    if list(values.shape) != wanted:
        raise ValueError(
            f"values must have shape {wanted} for {pattern} and shape {shape}, got {list(values.shape)}"
        )
    wanted = [*rows, -(-groups * pattern.bits_per_group // 8)]
    if list(indices.shape) != wanted:
        raise ValueError(
            f"indices must have shape {wanted} for {pattern} and shape {shape}, got {list(indices.shape)}"
        )
    if holds_data(indices):
        bad = ops.check_indices(indices, pattern, k=k)
        if bad is not None:
            raise ValueError(
                f"indices of group {list(bad)} ([other dims..., group]) are no legal choice of {pattern.n} "
                f"of {pattern.m}: they must be distinct, ascending and inside the group, and unused bits zero"
            )


def _from_pickle(
    values: Tensor,
    indices: Tensor,
    pattern: str,
    group_dim: int,
    shape: tuple[int, ...],
    remainder: Remainder,
    engine: str,
    is_parameter: bool,
) -> Tensor:
    weight = NMTensor.from_packed(
        values,
        indices,
        pattern,
        group_dim=group_dim,
        shape=shape,
        remainder=remainder,
        engine="decompress",
    )
    # A file from another machine may ask for an engine that is not there, or cannot run on this device.
    known = ENGINES.get(engine)
    if known is None or known.why_not(weight) is not None:
        known = best_engine(weight)
    weight = weight._rebuild(values, indices, known)
    return torch.nn.Parameter(weight, requires_grad=False) if is_parameter else weight


def compress(
    w: Tensor, pattern: Pattern | str, *, dim: int = 1, prune: bool = False, remainder: Remainder = "error"
) -> NMTensor:
    """Packs a weight: of each group only the kept values and their positions remain.

    ``compress(w, p).to_dense()`` equals ``w``, bit for bit except that pruned -0.0 become +0.0; with
    ``prune=True`` it equals ``nm_prune(w, p)``. Differentiable in ``w`` as long as the result is used
    directly; as an ``nn.Parameter`` it is frozen.

    Args:
        w: The dense weight, 1-D to 5-D, any strides.
        pattern: For example ``"2:4"``.
        dim: The dim that groups run along; may be negative.
        prune: Prune by the selection rule where ``w`` does not satisfy the pattern yet.
        remainder: ``"pad"`` allows a size along ``dim`` that is no multiple of m, and counts virtual zeros
            after it.

    Returns:
        The packed weight, of the same shape, dtype and device.

    Raises:
        TypeError: If an argument is of the wrong type or dtype.
        ValueError: If ``w`` violates the pattern and ``prune`` is False (the first offending group is named),
            or if an argument is out of range.
    """
    if isinstance(w, NMTensor):
        raise TypeError(f"w must be a dense Tensor, got an NMTensor packed as {w.pattern}; use w.to_dense()")
    pattern = Pattern.parse(pattern)
    if not prune:
        _refuse_violation(w, pattern, dim, remainder)
    values, indices = ops.pack(w, pattern, dim=dim, remainder=remainder)
    group_dim = 0 if w.dim() == 1 else dim % w.dim()
    portable = NMTensor(values, indices, pattern, group_dim, tuple(w.shape), remainder, "decompress", ())
    return portable.with_engine(None)


def _refuse_violation(w: Tensor, pattern: Pattern, dim: int, remainder: Remainder) -> None:
    violation = ops.find_violation(w, pattern, dim=dim, remainder=remainder)
    if violation is not None:
        raise ValueError(
            f"w does not satisfy {pattern}: the group along dim {dim} that starts at {list(violation.index)} "
            f"has {violation.kept} nonzeros, at most {pattern.n} are allowed. Train or prune it with that "
            "pattern, or pass prune=True"
        )


def linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiplies with a packed (or dense) weight.

    Equivalent to ``F.linear(x, W.to_dense(), bias)``. Differentiable in ``x``, in ``bias``, and in the values
    of a packed weight that was made by `compress` from a weight that requires gradients.

    Args:
        x: ``[..., in]``.
        W: ``[out, in]``, an `NMTensor` or a dense tensor.
        bias: ``[out]``.

    Returns:
        ``[..., out]``.
    """
    return F.linear(x, W, bias)


# Not the class: whoever may call that puts parts together that nobody has checked.
torch.serialization.add_safe_globals([_from_pickle])

# At the end, because these modules need the class above; they fill FUNCTIONS and OPS.
from . import _tensor_functions, _transformer_functions  # noqa: E402, F401
