"""Truth tables written by hand: small inputs with every expected value, one table an op.

Masks are strings of 0 and 1 in order of position; blanks and bars are for the eye.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.int8, torch.float8_e4m3fn)
WITH_INFINITY = FLOATS

nan, inf = float("nan"), float("inf")


def mask(text: str) -> Tensor:
    """Turns ``"10 01"`` into a bool tensor."""
    return torch.tensor([c == "1" for c in text if c in "01"])


def tensor(values: list[float] | list[list[float]], dtype: torch.dtype) -> Tensor:
    """The values in any dtype of ours; float8 has no constructor from a list of everything."""
    return torch.tensor(values, dtype=torch.float64).to(dtype)


class Selection(NamedTuple):
    """Which weights of a 1-dimensional ``w`` are kept (remainder "pad")."""

    name: str
    pattern: str
    w: list[float]
    kept: str
    dtypes: tuple[torch.dtype, ...] = DTYPES


SELECTIONS = [
    Selection("largest two", "2:4", [1, 4, 3, 2], "0110"),
    Selection("first two", "2:4", [4, 3, 2, 1], "1100"),
    Selection("last two", "2:4", [1, 2, 3, 4], "0011"),
    Selection("outer two", "2:4", [4, 1, 2, 3], "1001"),
    Selection("sign is ignored", "2:4", [-4, 3, -2, 1], "1100"),
    Selection("negative only", "2:4", [-1, -2, -3, -4], "0011"),
    Selection("two groups", "2:4", [1, 2, 3, 4, 8, 7, 6, 5], "0011 1100"),
    Selection("1:4", "1:4", [1, -4, 3, 2], "0100"),
    Selection("3:4", "3:4", [1, -4, 3, 2], "0111"),
    Selection("1:1 keeps all", "1:1", [0, 1, 2], "111"),
    Selection("4:4 keeps all", "4:4", [0, 1, 0, -2], "1111"),
    Selection("1:2", "1:2", [1, 2, 4, 3, 5, 5], "01 10 10"),
    Selection("2:3", "2:3", [1, 2, 3, 3, 2, 1], "011 110"),
    Selection("4:8", "4:8", [8, 1, 7, 2, 6, 3, 5, 4], "1010 1010"),
    Selection("1:16", "1:16", [*range(8), 15, *range(7)], "00000000 10000000"),
    Selection("all tie", "2:4", [1, 1, 1, 1], "1100"),
    Selection("tie with both signs", "2:4", [-1, 1, -1, 1], "1100"),
    Selection("tie for the last place", "2:4", [1, 3, 1, 1], "1100"),
    Selection("tie for the last place, later", "2:4", [0, 1, 3, 1], "0110"),
    Selection("three tie on top", "2:4", [2, 1, 2, 2], "1010"),
    Selection("all zero", "2:4", [0, 0, 0, 0], "1100"),
    Selection("one nonzero keeps the first zero too", "2:4", [0, 0, 0, 5], "1001"),
    Selection("-0 equals 0", "2:4", [-0.0, 0.0, 1, -0.0], "1010"),
    Selection("0 equals -0", "2:4", [0.0, -0.0, 0.0, -1], "1001"),
    Selection("short group keeps the larger", "1:4", [1, 2, 3, 4, 5, 7, 6], "0001 010"),
    Selection("short group of n", "2:4", [1, 2, 3, 4, 5, 6], "0011 11"),
    Selection("short group below n", "2:4", [4, 3, 2, 1, 0], "1100 1"),
    Selection("short group of zeros", "2:4", [4, 3, 2, 1, 0, 0, 0], "1100 110"),
    Selection("only a short group", "2:4", [1, 2, 2], "011"),
    Selection("one weight", "1:64", [0], "1"),
    Selection("infinity beats numbers", "1:4", [1, 2, -inf, 3], "0010", WITH_INFINITY),
    Selection("infinities tie", "1:4", [1, inf, -inf, inf], "0100", WITH_INFINITY),
    Selection("NaN beats infinity", "1:4", [inf, -inf, nan, inf], "0010", WITH_INFINITY),
    Selection("NaN then infinity", "2:4", [inf, -inf, nan, inf], "1010", WITH_INFINITY),
    Selection("NaNs tie", "2:4", [1, nan, -nan, nan], "0110", (*FLOATS, torch.float8_e4m3fn)),
    Selection("NaN beats the largest float8", "1:4", [448, -448, nan, 448], "0010", (torch.float8_e4m3fn,)),
    Selection("-128 is 128", "1:4", [127, -127, -128, 5], "0010", (torch.int8,)),
    Selection("-128 is larger than 127", "1:2", [127, -128, -128, 127], "01 10", (torch.int8,)),
    Selection("-127 ties with 127", "1:2", [127, -127, -127, 127], "10 10", (torch.int8,)),
]


# The smallest positive number of each dtype, all of them denormal.
TINY = {
    torch.float64: 2.0**-1074,
    torch.float32: 2.0**-149,
    torch.bfloat16: 2.0**-133,
    torch.float16: 2.0**-24,
    torch.float8_e4m3fn: 2.0**-9,
}


class Packed(NamedTuple):
    """The packed form of a 1-dimensional ``w`` (remainder "pad"), to the bit."""

    name: str
    pattern: str
    w: list[float]
    values: list[float]
    indices: list[int]


PACKED = [
    # The six 2:4 nibbles idx0 | idx1 << 2, two a byte, low nibble first.
    Packed("2:4 nibbles 0x4 0x8", "2:4", [1, 2, 0, 0, 3, 0, 4, 0], [1, 2, 3, 4], [0x84]),
    Packed("2:4 nibbles 0xC 0x9", "2:4", [5, 0, 0, 6, 0, 7, 8, 0], [5, 6, 7, 8], [0x9C]),
    Packed("2:4 nibbles 0xD 0xE", "2:4", [0, 1, 0, 2, 0, 0, 3, 4], [1, 2, 3, 4], [0xED]),
    Packed("2:4 one group", "2:4", [1, 0, 0, 2], [1, 2], [0x0C]),
    Packed("2:4 prunes", "2:4", [1, 2, 3, 4], [3, 4], [0x0E]),
    Packed("2:4 one nonzero", "2:4", [0, 0, 9, 0], [0, 9], [0x08]),
    Packed("2:4 all zero", "2:4", [0, 0, 0, 0], [0, 0], [0x04]),
    Packed("2:4 short group of one", "2:4", [1, 2, 0, 0, 3], [1, 2, 3, 0], [0x44]),
    Packed("2:4 short group of three", "2:4", [1, 2, 0, 0, 0, 3, 4], [1, 2, 3, 4], [0x94]),
    # 1:2 and 1:4: one field of two bits.
    Packed("1:2", "1:2", [1, 0, 0, 2, 0, 3, 4, 0, 0, 5], [1, 2, 3, 4, 5], [0b00_01_01_00, 0b01]),
    Packed("1:4", "1:4", [0, 0, 0, 1, 0, 0, 2, 0, 0, 3, 0, 0], [1, 2, 3], [0b01_10_11]),
    # 3:4, 2:3 and 4:8 need more bits as indices than as a mask.
    Packed("3:4", "3:4", [1, 0, 2, 3, 0, 4, 5, 6], [1, 2, 3, 4, 5, 6], [0b1110_1101]),
    Packed("2:3", "2:3", [1, 2, 0, 0, 3, 4, 5, 0, 6], [1, 2, 3, 4, 5, 6], [0b01_110_011, 0b1]),
    Packed("2:3 short", "2:3", [1, 2, 0, 3], [1, 2, 3, 0], [0b011_011]),
    Packed("4:8", "4:8", [1, 0, 2, 0, 3, 0, 4, 0], [1, 2, 3, 4], [0b01010101]),
    Packed("1:1", "1:1", [5, 0, 6], [5, 0, 6], [0b111]),
    # Fields of four and of eight bits.
    Packed("2:8", "2:8", [0, 0, 1, 0, 0, 0, 0, 2], [1, 2], [0x72]),
    Packed("1:16", "1:16", [0] * 11 + [3] + [0] * 4 + [0] * 15 + [4], [3, 4], [0xFB]),
    Packed("2:32", "2:32", [0] * 9 + [1] + [0] * 20 + [2, 0], [1, 2], [9, 30]),
    Packed("1:64", "1:64", [0] * 63 + [7], [7], [63]),
    Packed("1:64 short", "1:64", [0, 7], [7], [1]),
]


class Indices(NamedTuple):
    """Which group of a row of packed indices is the first bad one, or -1."""

    name: str
    pattern: str
    k: int
    indices: list[int]
    first_bad: int


INDICES = [
    Indices("legal", "2:4", 16, [0x84, 0xED], -1),
    Indices("not distinct", "2:4", 16, [0x84, 0x05], 2),
    Indices("descending", "2:4", 16, [0x14, 0x84], 1),
    Indices("first of two", "2:4", 16, [0x10, 0x00], 0),
    Indices("outside the group", "1:3", 9, [0b10_11_00], 1),
    Indices("outside the group of 12", "1:12", 24, [0xCB], 1),
    Indices("outside the group of 40", "1:40", 40, [40], 0),
    Indices("too few set", "3:4", 8, [0b1110_0101], 0),
    Indices("too many set", "3:4", 8, [0b1111_0111], 1),
    Indices("unused bits set", "2:4", 12, [0x84, 0x14], 2),
    Indices("unused bits of a mask set", "2:3", 6, [0b01_110_011], 1),
    Indices("a virtual position is legal", "2:4", 5, [0x44], -1),
    Indices("empty", "2:4", 0, [], -1),
]


class Violating(NamedTuple):
    """The first group of a 2-D ``w`` with too many nonzeros: (first coordinates, nonzeros) or None."""

    name: str
    pattern: str
    dim: int
    w: list[list[float]]
    expected: tuple[tuple[int, int], int] | None


VIOLATING = [
    Violating("none", "2:4", 1, [[1, 0, 0, 2], [0, 3, 4, 0]], None),
    Violating("all zero", "2:4", 1, [[0, 0, 0, 0]], None),
    Violating("second row", "2:4", 1, [[1, 0, 0, 2], [1, 3, 4, 0]], ((1, 0), 3)),
    Violating("second group", "2:4", 1, [[1, 2, 0, 0, 1, 1, 1, 1]], ((0, 4), 4)),
    Violating("first of two", "1:2", 1, [[1, 0, 1, 1], [1, 1, 0, 0]], ((0, 2), 2)),
    Violating("along rows", "1:2", 0, [[1, 0], [0, 2], [0, 3], [0, 4]], ((2, 1), 2)),
    Violating("along rows, first column first", "1:2", 0, [[0, 1], [0, 2], [3, 0], [4, 0]], ((2, 0), 2)),
    Violating("-0 is zero", "1:2", 1, [[-0.0, 1], [0.0, -0.0]], None),
    Violating("short group", "1:4", 1, [[1, 0, 0, 0, 2, 3]], ((0, 4), 2)),
]


class Tile(NamedTuple):
    """The best 2:4-in-rows-and-columns mask of a 4x4 tile."""

    name: str
    w: list[list[float]]
    kept: str


TILES = [
    Tile(
        "two blocks on the diagonal",
        [[9, 8, 1, 0], [7, 9, 0, 1], [1, 0, 9, 8], [0, 1, 8, 9]],
        "1100 1100 0011 0011",
    ),
    Tile(
        "a checkerboard",
        [[5, 0, 5, 0], [0, 5, 0, 5], [5, 0, 5, 0], [0, 5, 0, 5]],
        "1010 0101 1010 0101",
    ),
    Tile(
        "a cyclic band",
        [[9, 8, 0, 0], [0, 9, 8, 0], [0, 0, 9, 8], [8, 0, 0, 9]],
        "1100 0110 0011 1001",
    ),
    # Taking the largest first ends with 54: 10, 9, 9, 9, 8, 8, 1, 0. The best mask gives up the 10 for 60.
    Tile(
        "greedy fails",
        [[10, 9, 8, 0], [9, 0, 0, 8], [8, 0, 1, 8], [8, 9, 0, 0]],
        "0110 1001 0011 1100",
    ),
    Tile("all equal: the first class", [[1] * 4] * 4, "1100 1100 0011 0011"),
    Tile("all zero", [[0] * 4] * 4, "1100 1100 0011 0011"),
]
