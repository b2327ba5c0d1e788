"""``NMTensor``: the packed N:M weight, as a tensor that takes the place of the dense one.

This file holds the class, how to make one, and how it is copied and saved. What PyTorch functions do with it
is in ``_tensor_functions.py``; how it is multiplied is in ``engines.py``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from . import ops
from ._checks import holds_data
from ._forms import SharedForms
from ._ops import schemas
from ._tensor_checks import check_parts, refuse_violation
from ._tensor_tables import FUNCTIONS, OPS
from .engines import ENGINES, Engine, best_engine, find_engine, portable, unpack
from .pattern import Pattern

Remainder = ops.Remainder
Keep = Literal["both", "engine"]
KEEPS: tuple[Keep, ...] = ("both", "engine")


class NMTensor(torch.Tensor):
    """A weight in packed N:M form: of each group of m, the n kept values and where they stood.

    It has the shape, dtype and device of the dense weight, and stands in for it in ``F.linear``, convolutions
    and matrix products; so an ordinary ``nn.Linear`` or ``nn.Conv2d`` runs with it unchanged. Whatever it
    cannot do raises ``NotImplementedError`` with the name of the operation: nothing turns it into a dense
    tensor behind your back. Its weights are frozen: gradients reach the input and the bias.

    Make one with `compress`, or with `from_packed` from parts that came from elsewhere. To change one,
    ``copy_`` a weight into it, or write to ``values`` or ``indices``: what the engine multiplies with is
    derived from those, and is derived anew at the next call in eager mode (compiled code goes on with what
    it has until then).

    Attributes:
        values: The kept weights, ``[other dims..., groups * n]``, in group order.
        indices: Where they stood, uint8 ``[other dims..., ceil(groups * bits / 8)]``.
        encoding: ``"index"`` or ``"bitmask"``: how ``indices`` says it. Follows from the pattern.
        pattern: The `Pattern`.
        group_dim: The dim of the dense weight that groups run along.
        remainder: ``"pad"`` if its size may be no multiple of m, else ``"error"``.
        engine: Name of the engine that multiplies with it (see ``engines.py``).
        keep: ``"both"`` if the packed form and the engine's are held. ``"engine"`` if only the engine's is:
            then ``values`` and ``indices`` are made when asked for, bit for bit what was packed, and a write
            to them changes nothing.
        nbytes: Bytes of ``values`` and ``indices``; if they are not held, `engine_nbytes`.
        engine_nbytes: Bytes of the engine's form.
        held_nbytes: Bytes of all that is held.
    """

    packed_values: Tensor | None  # None: only the engine's form is kept
    packed_indices: Tensor | None
    pattern: Pattern
    group_dim: int
    rows: tuple[int, ...]  # sizes of the other dims, without batch
    batch: tuple[int, ...]  # sizes of leading dims that are broadcast: matmul expands a 2-D weight to batches
    k: int  # size of group_dim; kept because .shape of a subclass takes a trip through __torch_function__
    remainder: Remainder  # type: ignore[assignment]  # a method of torch.Tensor
    engine: str
    shared: SharedForms | None  # None: nothing to share, or not known (in compiled graphs)

    # ------------------------------------------------------------------------------------------- construction

    @staticmethod
    def __new__(  # noqa: D102 - see the class
        cls: type[NMTensor],
        values: Tensor | None,
        indices: Tensor | None = None,
        pattern: Pattern | None = None,
        group_dim: int = 0,
        shape: torch.Size | tuple[int, ...] = (),
        remainder: Remainder = "error",
        engine: str = "decompress",
        forms: tuple[Tensor, ...] = (),
        batch_dims: int = 0,
        shared: SharedForms | None = None,
        requires_grad: bool = False,
    ) -> NMTensor:
        # Checks nothing: it runs for every detach and view. `compress` and `from_packed` are the public
        # doors.
        if pattern is None:  # accelerate moves a parameter p by type(p)(moved, requires_grad=p.requires_grad)
            return cast(NMTensor, torch.nn.Parameter(cast(Tensor, values), requires_grad=requires_grad))
        like = forms[0] if values is None else values
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        self.packed_values = values
        self.packed_indices = indices
        self.pattern = pattern
        self.group_dim = group_dim
        self.k = shape[group_dim]
        self.batch = tuple(shape[:batch_dims])
        self.rows = (*shape[batch_dims:group_dim], *shape[group_dim + 1 :])
        self.remainder = remainder
        self.engine = engine
        for name, form in zip(find_engine(engine).forms, forms, strict=True):
            setattr(self, f"form_{name}", form)
        if shared is None and forms and holds_data(like):
            shared = SharedForms(self, forms)
        self.shared = shared
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
        check_parts(values, indices, pattern, group_dim, shape, remainder)
        weight = NMTensor(values, indices, pattern, group_dim, shape, remainder, "decompress", ())
        return weight.with_engine(engine)

    def with_engine(self, engine: str | None, *, keep: Keep = "both") -> NMTensor:
        """Returns the same weight, to be run by another engine; it shares the values and indices if held.

        Args:
            engine: Name of the engine; ``None`` chooses the best for this device, dtype and pattern.
            keep: ``"engine"`` holds only what the engine multiplies with: the memory of one form, not of two.
                For engines without a form of their own that is the packed form.

        Raises:
            ValueError: If there is no such engine, or it cannot run this weight, or cannot be kept alone; the
                message says why.
        """
        if keep not in KEEPS:
            raise ValueError(f"keep must be one of {KEEPS}, got {keep!r}")
        chosen = best_engine(self) if engine is None else find_engine(engine)
        reason = chosen.why_not(self)
        if reason is not None:
            raise ValueError(f"engine {chosen.name!r} cannot run this weight: {reason}")
        return self._rebuild(*portable(self), chosen, keep)

    def _rebuild(self, values: Tensor, indices: Tensor, engine: Engine, keep: Keep = "both") -> NMTensor:
        """The same layout with other contents; the forms of ``engine`` are built anew."""
        parts = (self.pattern, self.group_dim, self.dense_shape(), self.remainder)
        plain = NMTensor(values, indices, *parts, "decompress", (), len(self.batch))
        if not engine.forms:
            plain.engine = engine.name
            return plain
        if keep == "engine":
            if engine.restore is None:
                raise ValueError(
                    f"keep must be 'both' for engine {engine.name!r}: the packed form cannot be made again "
                    "from its own"
                )
            if values.requires_grad:
                raise ValueError("keep must be 'both' for a weight whose values take gradients")
        with torch.no_grad():
            forms = engine.build(plain)
        if keep == "engine":
            return NMTensor(None, None, *parts, engine.name, forms, len(self.batch))
        return NMTensor(values, indices, *parts, engine.name, forms, len(self.batch))

    def _map(self, fn: Callable[[Tensor], Tensor]) -> NMTensor:
        """The same weight with ``fn`` applied to every inner tensor: a copy."""
        return NMTensor(
            None if self.packed_values is None else fn(self.packed_values),
            None if self.packed_indices is None else fn(self.packed_indices),
            self.pattern,
            self.group_dim,
            self.dense_shape(),
            self.remainder,
            self.engine,
            tuple(fn(form) for form in self.forms()),
            len(self.batch),
        )

    def reshaped(self, group_dim: int, shape: tuple[int, ...], batch_dims: int) -> NMTensor:
        """The same inner tensors as a weight of another shape: what has the same canonical rows."""
        return NMTensor(
            self.packed_values,
            self.packed_indices,
            self.pattern,
            group_dim,
            shape,
            self.remainder,
            self.engine,
            self.forms(),
            batch_dims,
            None if torch.compiler.is_compiling() else self.shared,
        )

    def dense_shape(self) -> tuple[int, ...]:
        """``tuple(shape)`` without the trip through ``__torch_function__``."""
        with torch._C.DisableTorchFunctionSubclass():
            return tuple(self.shape)

    def forms(self) -> tuple[Tensor, ...]:
        """The engine's tensors."""
        return tuple(getattr(self, f"form_{name}") for name in find_engine(self.engine).forms)

    # --------------------------------------------------------------------------------------------- attributes

    # torch.Tensor has methods of these two names, for sparse COO tensors; here they are plain attributes.
    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """The kept weights."""
        return portable(self)[0] if self.packed_values is None else self.packed_values

    @property
    def indices(self) -> Tensor:  # type: ignore[override]
        """Where they stood."""
        return portable(self)[1] if self.packed_indices is None else self.packed_indices

    @property
    def encoding(self) -> str:
        """How `indices` says it."""
        return self.pattern.encoding

    @property
    def keep(self) -> Keep:
        """Whether the packed form is held beside the engine's."""
        return "engine" if self.packed_values is None else "both"

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of the packed form, or of the engine's where only that is held."""
        if self.packed_values is None or self.packed_indices is None:
            return self.engine_nbytes
        return _bytes(self.packed_values) + _bytes(self.packed_indices)

    @property
    def engine_nbytes(self) -> int:
        """Bytes of the tensors that the engine multiplies with; 0 if those are ``values`` and ``indices``."""
        return sum(map(_bytes, self.forms()))

    @property
    def held_nbytes(self) -> int:
        """Bytes of all tensors that the weight holds."""
        return self.nbytes if self.packed_values is None else self.nbytes + self.engine_nbytes

    def to_dense(self, dtype: torch.dtype | None = None, *, masked_grad: bool | None = None) -> Tensor:
        """Returns the dense weight: contiguous, of the same shape; pruned entries are +0.0.

        Args:
            dtype: Dtype of the result; ``None`` keeps it.
            masked_grad: Accepted because ``torch.Tensor.to_dense`` has it; without effect.
        """
        dense = unpack(self)
        return dense if dtype is None else dense.to(dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        like = self.forms()[0] if self.packed_values is None else self.packed_values
        dense_bytes = math.prod(self.dense_shape()) * like.itemsize
        padded = ", padded" if self.remainder == "pad" else ""
        alone = ", keep='engine'" if self.packed_values is None else ""
        return (
            f"NMTensor({self.pattern} along dim {self.group_dim}{padded}, shape={list(self.dense_shape())}, "
            f"dtype={like.dtype}, device='{like.device}', "
            f"{self.nbytes} bytes packed of {dense_bytes} dense, engine={self.engine!r}{alone})"
        )

    def __dir__(self) -> list[str]:
        # torch.export asks the first weight that it meets which attributes to follow on all of them, so the
        # forms of every engine are named here.
        forms = (f"form_{name}" for engine in ENGINES.values() for name in engine.forms)
        return sorted({*super().__dir__(), "packed_values", "packed_indices", *forms})

    # ------------------------------------------------------------------------------------- copying and saving

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Pattern, int, Remainder, str, int]]:
        names = [] if self.packed_values is None else ["packed_values", "packed_indices"]
        names += [f"form_{name}" for name in find_engine(self.engine).forms]
        return names, (self.pattern, self.group_dim, self.remainder, self.engine, len(self.batch))

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor],
        context: tuple[Pattern, int, Remainder, str, int],
        outer_size: torch.Size,
        outer_stride: object,
    ) -> NMTensor:
        pattern, group_dim, remainder, engine, batch_dims = context
        return NMTensor(
            inner.get("packed_values"),
            inner.get("packed_indices"),
            pattern,
            group_dim,
            outer_size,
            remainder,
            engine,
            tuple(inner[f"form_{name}"] for name in find_engine(engine).forms),
            batch_dims,
        )

    def _stable_hash_for_caching(self) -> str:
        """What compiled code may depend on: all but the contents. The caches of torch.compile ask for it.

        Caches outlive this package's version, so the ops that such code calls are part of it.
        """
        names, context = self.__tensor_flatten__()
        inner = [
            (name, part.dtype, tuple(part.shape), part.stride(), str(part.device), part.requires_grad)
            for name in names
            for part in (getattr(self, name),)
        ]
        return repr(("NMTensor", schemas(), self.dense_shape(), context, inner))

    def __reduce_ex__(self, protocol: object) -> tuple[Callable[..., object], tuple]:
        if is_fake(self):  # torch.compile of torch < 2.13 asks for the key of its caches in this way
            return str, (self._stable_hash_for_caching(),)
        # Engine forms are derived, so they are not saved. Everything else is plain tensors and builtins, so
        # that torch.load(weights_only=True) needs to trust one name only, which checks what it is given.
        state = (
            *portable(self),
            str(self.pattern),
            self.group_dim,
            self.dense_shape(),
            self.remainder,
            self.engine,
            getattr(self, "_is_param", False),
            self.keep,
        )
        return _from_pickle, state

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) in memo:
            return memo[id(self)]
        # Whatever takes gradients goes PyTorch's way, which refuses all but leaves.
        copied: Tensor = self._map(
            lambda part: copy.deepcopy(part, memo) if part.requires_grad else part.clone()
        )
        if getattr(self, "_is_param", False):
            copied = torch.nn.Parameter(copied, requires_grad=False)
        for name, value in vars(self).items():  # what others have put on it, as on any tensor
            if name not in vars(copied):
                setattr(copied, name, copy.deepcopy(value, memo))
        memo[id(self)] = copied
        return copied

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
            return handler(*args, **kwargs) if kwargs else handler(*args)
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


def _bytes(tensor: Tensor) -> int:
    """``tensor.nbytes``, also of symbolic sizes."""
    return tensor.numel() * tensor.element_size()


def inner_tensors(weight: NMTensor) -> list[Tensor]:
    """All tensors that a weight holds."""
    names, _ = weight.__tensor_flatten__()
    return [getattr(weight, name) for name in names]


def _from_pickle(
    values: Tensor,
    indices: Tensor,
    pattern: str,
    group_dim: int,
    shape: tuple[int, ...],
    remainder: Remainder,
    engine: str,
    is_parameter: bool,
    keep: Keep = "both",
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
    alone: Keep = "engine" if keep == "engine" and known.restore is not None else "both"
    weight = weight._rebuild(values, indices, known, alone)
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
        refuse_violation(w, pattern, dim, remainder)
    values, indices = ops.pack(w, pattern, dim=dim, remainder=remainder)
    group_dim = 0 if w.dim() == 1 else dim % w.dim()
    weight = NMTensor(values, indices, pattern, group_dim, tuple(w.shape), remainder, "decompress", ())
    return weight.with_engine(None)


# Not the class: whoever may call that puts parts together that nobody has checked.
torch.serialization.add_safe_globals([_from_pickle])

# At the end, because they need the class above; they fill the tables.
from . import _tensor_functions, _tensor_views, _transformer_functions, products  # noqa: E402, F401
