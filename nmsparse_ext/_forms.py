"""What a packed weight, its views and all threads that multiply with it have in common: the engine's forms.

Views hold pieces of the same forms. Whoever finds that ``values`` or ``indices`` were written to since the
forms were built, through whichever view, builds them anew in place, so that all others see it too.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .tensor import Keep, NMTensor


class SharedForms:
    """The forms of a whole weight.

    Attributes:
        weight_parts: What the weight is put together from besides its inner tensors.
        values: The packed form that the forms follow; ``None`` if only the forms are kept.
        indices: The same.
        forms: The forms of the whole weight.
        read_only: Whether the weight is a copy of a piece of another one, so that a write would get lost.
    """

    __slots__ = (
        "_casts",
        "_lock",
        "_versions",
        "batch_dims",
        "engine",
        "forms",
        "indices",
        "read_only",
        "rows",
        "values",
        "weight_parts",
    )

    def __init__(self, weight: NMTensor, forms: tuple[Tensor, ...], *, read_only: bool = False) -> None:
        self.weight_parts = (weight.pattern, weight.group_dim, weight.dense_shape(), weight.remainder)
        self.engine = weight.engine
        self.batch_dims = len(weight.batch)
        self.values = weight.packed_values
        self.indices = weight.packed_indices
        self.rows = len(weight.rows)
        self.forms = forms
        self.read_only = read_only
        self._lock = threading.RLock()
        self._casts: dict[torch.dtype, NMTensor] = {}
        self._versions = self._current()

    def _current(self) -> tuple[int, int] | None:
        """The version counters, ``None`` where there are none: tensors made in inference mode."""
        if self.values is None or self.indices is None:
            return None
        if self.values.is_inference() or self.indices.is_inference():
            return None
        return self.values._version, self.indices._version

    def refresh(self) -> None:
        """Builds the forms anew if the packed form was written to; a comparison of four numbers if not."""
        versions = self._versions
        if versions is None:
            return
        assert self.values is not None
        assert self.indices is not None
        if self.values._version != versions[0] or self.indices._version != versions[1]:
            self.rebuild()

    def rebuild(self) -> None:
        """Builds the forms anew from the packed form, in place."""
        from .engines import ENGINES
        from .tensor import NMTensor

        assert self.values is not None
        assert self.indices is not None
        with self._lock, torch.no_grad():
            versions = self._current()
            plain = NMTensor(self.values, self.indices, *self.weight_parts, "decompress", (), self.batch_dims)
            engine = ENGINES[self.engine]
            if engine.refill is not None:
                engine.refill(plain, self.forms)
            else:
                for form, built in zip(self.forms, engine.build(plain), strict=True):
                    form.copy_(built)
            self._casts.clear()
            self._versions = versions

    def written(self) -> None:
        """To be called after the forms themselves were written to."""
        with self._lock:
            self._casts.clear()
            self._versions = self._current()

    def cast(self, weight: NMTensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The forms of ``weight``, this weight or a view of it, in another dtype; made once for all views."""
        casts = self.cast_weight(dtype).forms()
        mine = weight.forms()
        return tuple(
            cast if form is whole else _same_piece(form, len(weight.rows), whole, self.rows, cast)
            for form, whole, cast in zip(mine, self.forms, casts, strict=True)
        )

    def cast_weight(self, dtype: torch.dtype) -> NMTensor:
        """The whole weight in another dtype, by the same engine; made once for all views."""
        self.refresh()
        with self._lock:
            cast = self._casts.get(dtype)
            if cast is None:
                cast = self._casts[dtype] = self._build_cast(dtype)
        return cast

    def _build_cast(self, dtype: torch.dtype) -> NMTensor:
        from .engines import ENGINES, portable
        from .tensor import NMTensor

        parts = self.weight_parts
        with torch.no_grad():
            whole = NMTensor(
                self.values, self.indices, *parts, self.engine, self.forms, self.batch_dims, shared=self
            )
            values, indices = portable(whole)
            engine = ENGINES[self.engine]
            keep: Keep = "both" if engine.restore is None else "engine"
            return whole._rebuild(values.to(dtype), indices, engine, keep)


def _same_piece(piece: Tensor, piece_rows: int, whole: Tensor, whole_rows: int, cast: Tensor) -> Tensor:
    """The piece of ``cast`` that ``piece`` is of ``whole``; only leading dims, the rows, are cut."""
    unit, cast_unit = whole.stride(whole_rows - 1), cast.stride(whole_rows - 1)
    if piece.numel() == 0 or unit == 0:
        return cast.new_empty((*piece.shape[:piece_rows], *cast.shape[whole_rows:]))
    start = (piece.storage_offset() - whole.storage_offset()) // unit * cast_unit + cast.storage_offset()
    return cast.as_strided(
        (*piece.shape[:piece_rows], *cast.shape[whole_rows:]),
        (
            *(stride // unit * cast_unit for stride in piece.stride()[:piece_rows]),
            *cast.stride()[whole_rows:],
        ),
        start,
    )
