"""``Pattern``: what it accepts, what it says of itself, and that it behaves like a number where it must."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmsparse_ext.pattern import MAX_M, Pattern

patterns = st.integers(1, MAX_M).flatmap(
    lambda m: st.builds(Pattern, st.integers(1, m), st.just(m)),
)


@pytest.mark.parametrize(
    ("text", "density", "embeds", "index_bits", "encoding", "bits"),
    [
        # 2:4 is the hardware nibble: two indices of two bits.
        ("2:4", 0.5, True, 2, "index", 4),
        ("1:4", 0.25, True, 2, "index", 2),
        ("3:4", 0.75, False, 2, "bitmask", 4),
        ("4:4", 1.0, False, 2, "bitmask", 4),
        ("1:1", 1.0, False, 2, "bitmask", 1),
        ("1:2", 0.5, False, 2, "index", 2),
        ("1:3", 1 / 3, False, 2, "index", 2),
        ("2:3", 2 / 3, False, 2, "bitmask", 3),
        ("1:5", 0.2, False, 4, "index", 4),
        ("2:8", 0.25, True, 4, "index", 8),
        ("3:8", 0.375, False, 4, "bitmask", 8),
        ("4:8", 0.5, False, 4, "bitmask", 8),
        ("1:16", 0.0625, True, 4, "index", 4),
        ("4:16", 0.25, False, 4, "index", 16),
        ("5:16", 0.3125, False, 4, "bitmask", 16),
        ("2:17", 2 / 17, False, 8, "index", 16),
        ("8:32", 0.25, False, 8, "bitmask", 32),
        ("4:32", 0.125, False, 8, "index", 32),
        ("2:64", 0.03125, True, 8, "index", 16),
        ("64:64", 1.0, False, 8, "bitmask", 64),
    ],
)
def test_table(text: str, density: float, embeds: bool, index_bits: int, encoding: str, bits: int) -> None:
    p = Pattern.parse(text)
    assert (p.density, p.sparsity) == (density, pytest.approx(1 - density))
    assert p.embeds_in_24 is embeds
    assert (p.index_bits, p.encoding, p.bits_per_group) == (index_bits, encoding, bits)
    assert p.is_dense is (p.n == p.m)


@pytest.mark.parametrize(
    ("pattern", "shape", "group_dim", "itemsize", "expected"),
    [
        # 8 rows of 4 groups: 8 values of 2 bytes, and 4 nibbles in 2 bytes.
        ("2:4", (8, 16), 1, 2, 8 * (8 * 2 + 2)),
        # Groups along dim 0: 16 rows of 2 groups; the nibbles of a row fill one byte.
        ("2:4", (8, 16), 0, 2, 16 * (4 * 2 + 1)),
        # One group leaves half a byte unused in every row.
        ("2:4", (8, 4), 1, 4, 8 * (2 * 4 + 1)),
        # A convolution [O, I, kh, kw]: one row for each filter and position.
        ("1:4", (6, 8, 3, 3), 1, 4, 6 * 9 * (2 * 4 + 1)),
        ("1:4", (6, 8, 3, 3), -3, 4, 6 * 9 * (2 * 4 + 1)),
        # A short last group is stored like a full one.
        ("2:4", (3, 10), 1, 4, 3 * (3 * 2 * 4 + 2)),
        ("8:32", (5, 64), 1, 1, 5 * (2 * 8 + 8)),
        ("2:4", (0, 16), 1, 4, 0),
        ("2:4", (16, 0), 1, 4, 0),
    ],
)
def test_packed_bytes(
    pattern: str, shape: tuple[int, ...], group_dim: int, itemsize: int, expected: int
) -> None:
    assert Pattern.parse(pattern).packed_bytes(shape, group_dim, itemsize) == expected


def test_packed_bytes_wants_a_dim_of_the_shape() -> None:
    with pytest.raises(ValueError, match=r"group_dim must be a dim of shape \(4, 8\), got 2"):
        Pattern(2, 4).packed_bytes((4, 8), 2, 4)


@given(patterns)
def test_text_round_trip(p: Pattern) -> None:
    assert Pattern.parse(str(p)) == p
    assert eval(repr(p)) == p
    assert Pattern.parse(p) is p


@given(patterns)
def test_encoding_is_the_shorter_one(p: Pattern) -> None:
    assert p.bits_per_group == min(p.n * p.index_bits, p.m)
    assert (p.encoding == "index") == (p.n * p.index_bits <= p.m)
    assert p.m <= 1 << p.index_bits


@given(patterns, patterns)
def test_equal_patterns_are_one_key(p: Pattern, q: Pattern) -> None:
    assert (p == q) == ((p.n, p.m) == (q.n, q.m))
    assert (p < q) == ((p.n, p.m) < (q.n, q.m))
    assert hash(p) == hash(Pattern(p.n, p.m))


@given(patterns)
def test_copies(p: Pattern) -> None:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(p, protocol)) == p
    assert copy.copy(p) == p
    assert copy.deepcopy(p) == p


@pytest.mark.parametrize("text", ["2:4", " 2:4", "2:4\n", "2 : 4", "02:04"])
def test_spaces_are_no_matter(text: str) -> None:
    assert Pattern.parse(text) == Pattern(2, 4)


def test_numpy_integers_become_ints() -> None:
    p = Pattern(np.int64(2), np.uint8(4))
    assert type(p.n) is int
    assert type(p.m) is int


@pytest.mark.parametrize(
    ("n", "m", "error", "message"),
    [
        (True, 4, TypeError, "n must be an int, got True of type bool"),
        (1, True, TypeError, "m must be an int, got True of type bool"),
        (2.0, 4, TypeError, "n must be an int, got 2.0 of type float"),
        (2, "4", TypeError, "m must be an int, got '4' of type str"),
        (None, 4, TypeError, "n must be an int, got None"),
        (0, 4, ValueError, "n must be between 1 and m = 4 .*, got 0"),
        (-1, 4, ValueError, "n must be between 1 and m = 4 .*, got -1"),
        (5, 4, ValueError, "n must be between 1 and m = 4 .*, got 5"),
        (2, 0, ValueError, "m must be between 1 and 64, got 0"),
        (2, 65, ValueError, "m must be between 1 and 64, got 65"),
    ],
)
def test_bad_numbers(n: object, m: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Pattern(n, m)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["", "2", "2:", ":4", "2;4", "2:4:8", "-2:4", "2.0:4", "two:4", "٢:٤", "99999:4"]
)
def test_bad_text(text: str) -> None:
    with pytest.raises(ValueError, match='pattern must look like "n:m"'):
        Pattern.parse(text)


@pytest.mark.parametrize("text", ["5:4", "0:4", "2:65"])
def test_bad_numbers_in_text(text: str) -> None:
    with pytest.raises(ValueError, match=f"final '{text}': ."):
        Pattern.parse(text, argument="final")


@pytest.mark.parametrize("value", [None, 2, (2, 4), b"2:4", torch.tensor(2)])
def test_neither_pattern_nor_text(value: object) -> None:
    with pytest.raises(TypeError, match='pattern must be a Pattern or text such as "2:4", got'):
        Pattern.parse(value)  # type: ignore[arg-type]


def test_immutable() -> None:
    p = Pattern(2, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.n = 3  # type: ignore[misc]
    # Slots: the exception's type differs between Python releases.
    with pytest.raises((AttributeError, TypeError)):
        p.k = 3  # type: ignore[attr-defined]


def test_in_compiled_code() -> None:
    """A pattern is a constant there: no graph break, whether it comes from outside or is made inside."""

    @torch.compile(fullgraph=True, backend="eager")
    def f(x: torch.Tensor, p: Pattern) -> torch.Tensor:
        q = Pattern.parse("1:4")
        r = Pattern(p.n, 8)
        return x * p.n / p.m + q.index_bits + r.bits_per_group + p.packed_bytes(x.shape, 1, 4)

    x = torch.ones(2, 8)
    expected = 0.5 + 2 + 8 + 2 * (4 * 4 + 1)
    assert torch.equal(f(x, Pattern(2, 4)), torch.full((2, 8), expected))


def test_in_exported_code() -> None:
    class Scale(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * Pattern.parse("2:4").n

    x = torch.ones(3)
    assert torch.equal(torch.export.export(Scale(), (x,)).module()(x), 2 * x)
