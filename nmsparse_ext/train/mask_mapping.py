"""What ``sparsifier.masks`` is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .sparsifier import Sparsifier


class MaskMapping(Mapping[str, Tensor]):
    """The masks of a `Sparsifier`, by parameter or module name; each is unpacked when it is looked up."""

    def __init__(self, sparsifier: Sparsifier) -> None:
        self._sparsifier = sparsifier

    def __getitem__(self, name: str) -> Tensor:
        return self._sparsifier._find(name).whole_mask

    def __contains__(self, name: object) -> bool:
        return self._sparsifier._resolve(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._sparsifier._weights)

    def __len__(self) -> int:
        return len(self._sparsifier._weights)

    def __repr__(self) -> str:
        return f"masks of {list(self)}"
