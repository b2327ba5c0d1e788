"""ERK: figures of the DominoSearch paper's networks, properties, rounding to patterns."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmsparse_ext import Pattern
from nmsparse_ext.scheme import prunable_weights
from nmsparse_ext.search.erk import erk_densities, round_densities


def resnet_shapes(**options: object) -> dict[str, tuple[int, ...]]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    with torch.device("meta"):
        config = transformers.ResNetConfig(num_labels=1000, **options)
        model = transformers.ResNetForImageClassification(config)
    shapes = {weight.name: tuple(weight.parameter.shape) for weight in prunable_weights(model)}
    return {
        name.removesuffix(".weight")
        .removesuffix(".convolution")
        .removeprefix("resnet.encoder.stages.")
        .replace(".layers", ""): shape
        for name, shape in shapes.items()
    }


def test_resnet50_at_80_percent() -> None:
    erk = erk_densities(resnet_shapes(), 0.2)
    assert erk.epsilon == pytest.approx(99.56, abs=0.005)
    dense = [name for name, density in erk.densities.items() if density == 1]
    blocks = [f"0.{block}.layer.{layer}" for block in range(3) for layer in (0, 2)]
    assert sorted(dense) == sorted([*blocks, "0.0.shortcut", "1.0.layer.0"])
    sparsity = {name: 1 - density for name, density in erk.densities.items()}
    assert sparsity["resnet.embedder.embedder"] == pytest.approx(0.143, abs=5e-4)
    assert sparsity["3.1.layer.1"] == pytest.approx(0.9565, abs=5e-5)
    assert sparsity["classifier.1"] == pytest.approx(0.852, abs=5e-4)


def test_resnet18_at_875_permille() -> None:
    shapes = resnet_shapes(layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2])
    erk = erk_densities(shapes, 0.125)
    assert erk.epsilon == pytest.approx(146.67, abs=0.005)
    dense = {name for name, density in erk.densities.items() if density == 1}
    assert dense == {"resnet.embedder.embedder", "1.0.shortcut", "2.0.shortcut"}
    assert 1 - erk.densities["0.1.layer.1"] == pytest.approx(0.467, abs=5e-4)
    assert 1 - erk.densities["3.1.layer.1"] == pytest.approx(0.936, abs=5e-4)
    assert 1 - erk.densities["classifier.1"] == pytest.approx(0.567, abs=5e-4)


SHAPES = st.dictionaries(
    st.text("abc", min_size=1),
    st.lists(st.integers(1, 64), min_size=2, max_size=4).map(tuple),
    min_size=1,
    max_size=6,
)


@given(shapes=SHAPES, density=st.floats(0.01, 1))
def test_keeps_as_much_as_asked_for(shapes: dict[str, tuple[int, ...]], density: float) -> None:
    erk = erk_densities(shapes, density)
    assert list(erk.densities) == list(shapes)
    assert all(0 < each <= 1 for each in erk.densities.values())
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    kept = sum(erk.densities[name] * sizes[name] for name in shapes)
    # Rounded up to whole weights, layer by layer.
    assert -1e-6 <= kept - density * sum(sizes.values()) <= len(shapes) + 1e-6
    for name, each in erk.densities.items():  # proportional, but for what would be more than everything
        wanted = erk.epsilon * sum(shapes[name]) / sizes[name] if math.isfinite(erk.epsilon) else 1.0
        assert each == pytest.approx(min(wanted, 1.0)) or each == 1.0


def test_what_is_dense_counts() -> None:
    erk = erk_densities({"a": (8, 8), "b": (8, 24), "c": (8, 32)}, 0.5, dense=["b"])
    assert erk.densities["b"] == 1
    assert 64 * erk.densities["a"] + 256 * erk.densities["c"] == pytest.approx(256 - 192)
    with pytest.raises(ValueError, match=r"density must be at least 0\.375, .* got 0\.25"):
        erk_densities({"a": (8, 8), "b": (8, 24), "c": (8, 32)}, 0.25, dense=["b"])


@pytest.mark.parametrize(
    ("shapes", "density", "dense", "message"),
    [
        ({"a": (2, 2)}, 0.0, (), r"density must be more than 0 and at most 1, got 0\.0"),
        ({"a": (2, 2)}, 1.5, (), r"density must be .*, got 1\.5"),
        ({"a": (2, 0)}, 0.5, (), r"shapes must have positive sizes, got \(2, 0\) for a"),
        ({"a": (2, 2)}, 0.5, ("b",), r"dense must name weights of shapes, got b"),
    ],
)
def test_refuses(
    shapes: dict[str, tuple[int, ...]], density: float, dense: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        erk_densities(shapes, density, dense=dense)


PATTERNS = [Pattern(1 << i, 16) for i in range(5)]


class TestRounding:
    def test_nearest_as_a_ratio(self) -> None:
        densities = {"a": 0.17, "b": 0.18, "c": 0.9}
        rounded = round_densities(densities, dict.fromkeys("abc", PATTERNS), lambda _: True)
        assert rounded == dict.fromkeys("abc", Pattern(16, 16))  # there is room for everything
        limit = {"a": Pattern(2, 16), "b": Pattern(4, 16), "c": Pattern(16, 16)}
        rounded = round_densities(
            densities, dict.fromkeys("abc", PATTERNS), lambda ps: all(ps[n].n <= limit[n].n for n in ps)
        )
        assert rounded == limit

    def test_the_one_furthest_above_goes_down_first(self) -> None:
        densities = {"a": 0.30, "b": 0.20}  # 4:16 and 4:16: b is above, a below
        rounded = round_densities(
            densities, dict.fromkeys("ab", PATTERNS), lambda ps: sum(p.n for p in ps.values()) <= 7
        )
        assert rounded == {"a": Pattern(4, 16), "b": Pattern(2, 16)}

    def test_impossible(self) -> None:
        with pytest.raises(ValueError, match="not even the sparsest"):
            round_densities({"a": 0.5}, {"a": PATTERNS}, lambda _: False)

    @given(
        densities=st.dictionaries(st.sampled_from("abcde"), st.floats(0.01, 1), min_size=1),
        sizes=st.lists(st.integers(1, 100), min_size=5, max_size=5),
        share=st.floats(0.0625, 1),
    )
    def test_fits_and_leaves_no_room(
        self, densities: dict[str, float], sizes: list[int], share: float
    ) -> None:
        size = dict(zip("abcde", sizes, strict=True))
        limit = share * sum(size[name] * 16 for name in densities)

        def fits(patterns: dict[str, Pattern]) -> bool:
            return sum(size[name] * p.n for name, p in patterns.items()) <= limit

        rounded = round_densities(densities, dict.fromkeys(densities, PATTERNS), fits)
        assert fits(rounded)
        for name, pattern in rounded.items():
            assert pattern.is_dense or not fits({**rounded, name: Pattern(2 * pattern.n, 16)})
