"""``Pattern``: n kept of every m. The one place that knows what a pattern costs in bits."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass

MAX_M = 64  # a group's mask fits one machine word in every engine

_TEXT = re.compile(r"\s*([0-9]{1,4})\s*:\s*([0-9]{1,4})\s*")


@dataclass(frozen=True, slots=True, order=True)
class Pattern:
    """An N:M pattern: of every ``m`` consecutive weights along the group dim, ``n`` are kept.

    Immutable, hashable, picklable; ordered by ``(n, m)``. Both fields are plain Python ints, so a pattern is
    a constant to ``torch.compile``.

    Args:
        n: How many weights of a group are kept, ``1 <= n <= m``. Never how many are pruned.
        m: The size of a group, ``1 <= m <= 64``.

    Raises:
        TypeError: If ``n`` or ``m`` is no integer. ``bool`` is refused, as it is a slip more often than a
            number.
        ValueError: If ``n`` or ``m`` is out of range.

    Example:
        >>> p = Pattern.parse("2:4")
        >>> p.n, p.m, p.density, str(p)
        (2, 4, 0.5, '2:4')
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        n, m = _as_int("n", self.n), _as_int("m", self.m)
        if not 1 <= m <= MAX_M:
            raise ValueError(f"m must be between 1 and {MAX_M}, got {m}")
        if not 1 <= n <= m:
            raise ValueError(f"n must be between 1 and m = {m} (n is how many of every m are kept), got {n}")
        # NumPy integers and the like become ints; frozen only guards against users.
        object.__setattr__(self, "n", n)
        object.__setattr__(self, "m", m)

    @classmethod
    def parse(cls, value: Pattern | str, *, argument: str = "pattern") -> Pattern:
        """Returns ``value`` as a pattern.

        Args:
            value: A pattern (returned as it is) or text such as ``"2:4"``.
            argument: The name that errors give to ``value``.

        Raises:
            TypeError: If ``value`` is neither.
            ValueError: If the text is not ``n:m``, or its numbers are out of range.
        """
        if isinstance(value, Pattern):
            return value
        if not isinstance(value, str):
            raise TypeError(f'{argument} must be a Pattern or text such as "2:4", got {_describe(value)}')
        match = _TEXT.fullmatch(value)
        if match is None:
            raise ValueError(f'{argument} must look like "n:m", for example "2:4", got {value!r}')
        try:
            return cls(int(match[1]), int(match[2]))
        except ValueError as error:
            raise ValueError(f"{argument} {value!r}: {error}") from None

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def __repr__(self) -> str:
        return f"Pattern({self.n}, {self.m})"

    @property
    def density(self) -> float:
        """The fraction of weights kept, ``n / m``."""
        return self.n / self.m

    @property
    def sparsity(self) -> float:
        """The fraction of weights pruned, ``(m - n) / m``."""
        return (self.m - self.n) / self.m

    @property
    def is_dense(self) -> bool:
        """Whether nothing is pruned (``n == m``)."""
        return self.n == self.m

    @property
    def embeds_in_24(self) -> bool:
        """Whether such a weight always satisfies 2:4 too, so that sparse tensor cores run it exactly."""
        return self.n <= 2 and self.m % 4 == 0

    @property
    def index_bits(self) -> int:
        """The width of one index in the packed form: 2 bits for ``m <= 4``, 4 for ``m <= 16``, 8 above."""
        return 2 if self.m <= 4 else 4 if self.m <= 16 else 8

    @property
    def encoding(self) -> str:
        """How the packed form says what is kept: ``"index"`` if no longer than a ``"bitmask"``."""
        return "index" if self.n * self.index_bits <= self.m else "bitmask"

    @property
    def bits_per_group(self) -> int:
        """Bits of ``indices`` that one group takes: ``n`` indices, or a mask of ``m`` bits."""
        return min(self.n * self.index_bits, self.m)

    def groups(self, k: int) -> int:
        """Number of groups along a group dim of size ``k``, a short last one included."""
        return -(-k // self.m)

    def kept(self, k: int) -> int:
        """How many of ``k`` weights along the group dim are kept; a short last group keeps up to ``n``."""
        return k // self.m * self.n + min(k % self.m, self.n)

    def packed_bytes(self, shape: Sequence[int], group_dim: int, itemsize: int) -> int:
        """Bytes of the packed form (values and indices) of a weight.

        Args:
            shape: The weight's shape.
            group_dim: The dim that groups run along; may be negative.
            itemsize: Bytes of one value.

        Returns:
            ``rows * (groups * n * itemsize + ceil(groups * bits_per_group / 8))``, where ``rows`` is the
            product of the other dims.
        """
        if not -len(shape) <= group_dim < len(shape):
            raise ValueError(f"group_dim must be a dim of shape {tuple(shape)}, got {group_dim}")
        k = shape[group_dim]
        rows = math.prod(shape) // k if k else 0
        groups = self.groups(k)
        return rows * (groups * self.n * itemsize + -(-groups * self.bits_per_group // 8))


def _as_int(name: str, value: object) -> int:
    # `type(value) is int` first: it is the common case, and the one that torch.compile can fold.
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {_describe(value)}")
    return int(value)


def _describe(value: object) -> str:
    return f"{value!r} of type {type(value).__name__}"
