"""Layers that the GPU benches measure, what GPUs can do at most, and what is aimed at.

Peaks are NVIDIA's published ones. Targets are from published measurements of others and from the bytes and
multiplications that a product takes; none is a measurement of ours.
"""

from __future__ import annotations

from typing import NamedTuple

from nmsparse_ext import Pattern

TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
QUICK_TOKENS = (1, 16, 64, 256, 4096)


class Layer(NamedTuple):
    """A linear layer.

    Attributes:
        group: What it is from.
        name: Its name there.
        rows: Outputs.
        k: Inputs.
        tokens: For how many tokens it is measured.
    """

    group: str
    name: str
    rows: int
    k: int
    tokens: tuple[int, ...] = TOKENS


def _layers(group: str, shapes: dict[str, tuple[int, int]]) -> list[Layer]:
    return [Layer(group, name, rows, k) for name, (rows, k) in shapes.items()]


SQUARES = [Layer("square", str(n), n, n, (n,)) for n in (1024, 2048, 4096, 8192, 16384)]
QWEN = _layers(
    "Qwen2.5-7B",
    {"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)},
)
LLAMA = _layers(
    "Llama-3-8B",
    {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
)
BERT = _layers(
    "BERT base", {"qkv": (2304, 768), "o": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}
) + _layers("BERT large", {"fc1": (4096, 1024), "fc2": (1024, 4096)})
VIT = _layers("ViT-L", {"qkv": (3072, 1024), "proj": (1024, 1024), "fc1": (4096, 1024), "fc2": (1024, 4096)})
#: ResNet-50's 1x1 convolutions: (outputs, inputs, places of an image), for 32 images.
_POINTWISE = (
    (64, 64, 56), (256, 64, 56), (64, 256, 56), (128, 512, 28), (512, 128, 28), (256, 1024, 14),
    (1024, 256, 14), (512, 2048, 7), (2048, 512, 7),
)  # fmt: skip
RESNET = [
    Layer("ResNet-50 1x1", f"{out} from {inputs} at {side}x{side}", out, inputs, (32 * side * side,))
    for out, inputs, side in _POINTWISE
]
LAYERS = [*SQUARES, *QWEN, *LLAMA, *BERT, *VIT, *RESNET]
#: What fits into a few minutes.
QUICK = [
    Layer("square", "4096", 4096, 4096, (4096,)),
    *(layer._replace(tokens=QUICK_TOKENS) for layer in LLAMA if layer.name in ("o", "gate_up")),
]
TINY = [Layer("square", "tiny", 64, 64, (64,)), Layer("Llama-3-8B", "o", 32, 64, (1, 16, 64))]

# --------------------------------------------------------------------------------------------------- roofline


class Peaks(NamedTuple):
    """What a GPU can do at most: dense operations a second by bytes of an element, and bytes a second."""

    name: str
    ops16: float
    ops8: float
    bytes: float

    def ops(self, itemsize: int) -> float:
        """Dense operations a second; sparse tensor cores do twice as many."""
        return self.ops8 if itemsize == 1 else self.ops16 if itemsize == 2 else self.ops16 / 2


#: In the order in which a GPU's name is looked for.
PEAKS = (
    Peaks("H200", 989e12, 1979e12, 4.8e12),
    Peaks("H100 PCIe", 756e12, 1513e12, 2.0e12),
    Peaks("H100", 989e12, 1979e12, 3.35e12),
    Peaks("A100-PCIE", 312e12, 624e12, 1.94e12),
    Peaks("A100", 312e12, 624e12, 2.04e12),
)


def peaks_of(gpu: str) -> Peaks | None:
    """What is known of a GPU by its name."""
    return next((peaks for peaks in PEAKS if peaks.name in gpu), None)


class Roofline(NamedTuple):
    """The least that a product takes.

    Attributes:
        operations: Multiplications and additions of the dense product.
        dense_bytes: What the dense product reads and writes at least.
        packed_bytes: The same with the weight packed.
        bound: How many times as fast as dense the packed product can be; None for an unknown GPU.
        limit: ``"memory"`` or ``"math"``: what bounds the dense product.
    """

    operations: int
    dense_bytes: int
    packed_bytes: int
    bound: float | None
    limit: str


def roofline(
    layer: Layer, tokens: int, pattern: str, itemsize: int, out: int, peaks: Peaks | None
) -> Roofline:
    """The terms of a product.

    Args:
        layer: The layer.
        tokens: Rows of its input.
        pattern: The weight's pattern.
        itemsize: Bytes of an element of weight and input.
        out: Bytes of an element of the result.
        peaks: What the GPU can do.
    """
    parsed = Pattern.parse(pattern)
    weight = layer.rows * layer.k * itemsize
    moved = tokens * (layer.k * itemsize + layer.rows * out)
    packed = parsed.packed_bytes((layer.rows, layer.k), 1, itemsize)
    operations = 2 * tokens * layer.rows * layer.k
    if peaks is None:
        return Roofline(operations, weight + moved, packed + moved, None, "unknown")
    math, memory = operations / peaks.ops(itemsize), (weight + moved) / peaks.bytes
    cores = 2 if parsed.embeds_in_24 else 1
    least = max(math / cores, (packed + moved) / peaks.bytes)
    limit = "math" if math > memory else "memory"
    return Roofline(operations, weight + moved, packed + moved, max(math, memory) / least, limit)


# ---------------------------------------------------------------------------------------------------- targets


class Target(NamedTuple):
    """What is aimed at, in times as fast as cuBLAS.

    Attributes:
        least: What has to be reached.
        more: What would be better, in words.
    """

    least: float
    more: str = ""


_SMALL = {
    "2:4": Target(1.6, "bound 1.78"),
    "1:4": Target(3, "bound 3.56"),
    "1:8": Target(5),
    "1:16": Target(8),
}


def target(gpu: str, dtype: str, pattern: str, layer: Layer, tokens: int) -> Target:
    """What a product aims at; at least never to be slower than dense."""
    is_large = layer.rows * layer.k >= 4096 * 4096
    bits8 = dtype in ("int8", "float8_e4m3fn")
    if tokens == 1 and is_large and not bits8 and pattern in _SMALL:
        return _SMALL[pattern]
    if tokens <= 32 or pattern != "2:4" or not is_large:
        return Target(1.0)
    if "A100" in gpu and tokens >= 4096:
        if dtype == "int8":
            return Target(2.0, "strong 2.2")
        return Target(1.5, "strong 1.7, moonshot 1.9")
    if 64 <= tokens <= 256:
        return Target(1.0, "strong 1.2, moonshot 1.6")
    if tokens < 4096:
        return Target(1.0)
    if bits8:
        return Target(1.4, "" if dtype == "int8" else "moonshot 1.6")
    return Target(1.5) if "PCIe" in gpu else Target(1.2, "aim 1.4, moonshot 1.6")


#: Ours over torch's to_sparse_semi_structured, up to 256 tokens.
OVER_TORCH = 1.3
#: Microseconds of a call on the host.
HOST_MICROSECONDS = 10.0
