"""NMTensor in the place of a dense weight: same results, nothing densified, the rest refused by name."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from packed_samples import ENGINES, PATTERNS, freeze, packed, packed_copy, pruned_net, sparse
from torch import Tensor, nn

import nmsparse_ext as nms
from nmsparse_ext import engines
from nmsparse_ext.tensor import NMTensor

# ---------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compress_keeps_what_the_pattern_keeps(pattern: str, dtype: torch.dtype) -> None:
    p = nms.Pattern.parse(pattern)
    w = torch.randn(3, 2 * p.m).mul(20).to(dtype)
    weight = nms.compress(w, pattern, prune=True)
    assert (weight.shape, weight.dtype, weight.device) == (w.shape, w.dtype, w.device)
    assert (weight.pattern, weight.group_dim, weight.encoding) == (p, 1, p.encoding)
    dense = weight.to_dense()
    assert type(dense) is Tensor
    assert dense.is_contiguous()
    assert torch.equal(dense.view(torch.uint8), nms.nm_prune(w, pattern).view(torch.uint8))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bytes_are_what_the_formula_says(pattern: str) -> None:
    p = nms.Pattern.parse(pattern)
    rows, groups = 5, 3
    weight = nms.compress(torch.randn(rows, groups * p.m, dtype=torch.bfloat16), pattern, prune=True)
    index_bits = 2 if p.m <= 4 else 4 if p.m <= 16 else 8
    row_bytes = -(-groups * min(p.n * index_bits, p.m) // 8)
    assert weight.values.shape == (rows, groups * p.n)
    assert weight.indices.shape == (rows, row_bytes)
    assert weight.nbytes == rows * groups * p.n * 2 + rows * row_bytes


@pytest.mark.parametrize(("ndim", "dim"), [(n, d) for n in range(1, 6) for d in range(n)])
def test_any_dim_of_any_shape(ndim: int, dim: int) -> None:
    shape = [2, 3, 2, 3, 2][:ndim]
    shape[dim] = 8
    w = sparse(*shape, dim=dim)
    weight = nms.compress(w.transpose(0, -1).contiguous().transpose(0, -1), "2:4", dim=dim - ndim)
    assert weight.group_dim == dim
    assert weight.values.shape == (*shape[:dim], *shape[dim + 1 :], 4)
    assert torch.equal(weight.to_dense(), w)


def test_a_violation_is_named() -> None:
    w = sparse(4, 8)
    w[2, 4:8] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    with pytest.raises(ValueError, match=r"starts at \[2, 4\] has 3 nonzeros, at most 2"):
        nms.compress(w, "2:4")
    assert torch.equal(nms.compress(w, "2:4", prune=True).to_dense(), nms.nm_prune(w, "2:4"))


def test_remainder() -> None:
    w = nms.nm_prune(torch.randn(3, 10), "2:4", remainder="pad")
    with pytest.raises(ValueError, match="multiple of m = 4"):
        nms.compress(w, "2:4")
    weight = nms.compress(w, "2:4", remainder="pad")
    assert torch.equal(weight.to_dense(), w)
    torch.testing.assert_close(F.linear(w, weight), F.linear(w, w))
    assert "padded" in repr(weight)


def test_packing_a_packed_weight_is_refused() -> None:
    with pytest.raises(TypeError, match="packed as 2:4"):
        nms.compress(packed(sparse(4, 8)), "2:4")


def test_repr_says_what_it_is() -> None:
    text = repr(packed(sparse(4, 8)))
    assert text == str(packed(sparse(4, 8)))
    engine = packed(sparse(4, 8)).engine
    for part in ("2:4", "dim 1", "[4, 8]", "float32", "cpu", "68 bytes packed of 128", engine):
        assert part in text


FAULTS = {
    "values are no tensor": ({"values": [1.0]}, TypeError, "values must be a Tensor"),
    "values of a dtype": (
        {"values": torch.zeros(2, 4, dtype=torch.int32)},
        TypeError,
        "values must be one of",
    ),
    "indices of a dtype": (
        {"indices": torch.zeros(2, 1, dtype=torch.int8)},
        TypeError,
        "indices must be torch.uint8",
    ),
    "another device": (
        {"indices": torch.zeros(2, 1, dtype=torch.uint8, device="meta")},
        ValueError,
        "device",
    ),
    "values too short": ({"values": torch.zeros(2, 3)}, ValueError, "values must have shape [2, 4]"),
    "indices too long": (
        {"indices": torch.zeros(2, 2, dtype=torch.uint8)},
        ValueError,
        "indices must have shape [2, 1]",
    ),
    "another shape": ({"shape": (3, 8)}, ValueError, "values must have shape [3, 4]"),
    "a negative size": ({"shape": (-2, 8)}, ValueError, "non-negative"),
    "too many dims": ({"shape": (1, 1, 1, 1, 2, 8)}, ValueError, "1 to 5"),
    "group dim": ({"group_dim": 2}, ValueError, "group_dim must be in [0, 2)"),
    "remainder": ({"remainder": "cut"}, ValueError, "remainder must be"),
    "no multiple": ({"shape": (2, 7)}, ValueError, "no multiple of m = 4"),
    "pattern": ({"pattern": "4:2"}, ValueError, "4:2"),
    "engine": ({"engine": "warp"}, ValueError, "'warp'"),
    "descending indices": (
        {"indices": torch.tensor([[0x44], [0x11]], dtype=torch.uint8)},
        ValueError,
        "[1, 0]",
    ),
    "twice the same": ({"indices": torch.tensor([[0x44], [0x04]], dtype=torch.uint8)}, ValueError, "[1, 1]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_from_packed_checks_its_parts(fault: str) -> None:
    good = {
        "values": torch.arange(8.0).view(2, 4),
        "indices": torch.tensor([[0x44], [0x44]], dtype=torch.uint8),
        "pattern": "2:4",
        "group_dim": 1,
        "shape": (2, 8),
    }
    wrong, error, message = FAULTS[fault]
    arguments = {**good, **wrong}
    values, indices, pattern = (arguments.pop(name) for name in ("values", "indices", "pattern"))
    with pytest.raises(error) as caught:
        NMTensor.from_packed(values, indices, pattern, **arguments)
    assert message in str(caught.value)


def test_from_packed_by_hand() -> None:
    indices = torch.tensor([[0b11_01_01_00], [0b11_10_10_00]], dtype=torch.uint8)
    weight = NMTensor.from_packed(
        torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]), indices, "2:4", group_dim=1, shape=(2, 8)
    )
    assert weight.to_dense().tolist() == [[1, 2, 0, 0, 0, 3, 0, 4], [5, 0, 6, 0, 0, 0, 7, 8]]


# --------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [(), (0,), (5,), (2, 3), (2, 0, 3)])
def test_linear_is_exact(engine: str, bias: bool, batch: tuple[int, ...]) -> None:
    w, b, x = sparse(12, 16), torch.randn(12) if bias else None, torch.randn(*batch, 16)
    assert torch.equal(nms.linear(x, packed(w, engine=engine), b), F.linear(x, w, b))
    assert torch.equal(nms.linear(x, w, b), F.linear(x, w, b))


CONVS = {
    "conv1d": (F.conv1d, (2, 8, 9), (6, 8, 3), {}),
    "conv2d": (F.conv2d, (2, 8, 9, 7), (6, 8, 3, 3), {"stride": 2, "padding": 1}),
    "same": (F.conv2d, (2, 8, 9, 7), (6, 8, 3, 2), {"padding": "same", "dilation": 2}),
    "groups": (F.conv2d, (2, 16, 9, 7), (6, 8, 3, 3), {"groups": 2}),
    "pointwise": (F.conv2d, (2, 8, 5, 5), (6, 8, 1, 1), {}),
    "conv3d": (F.conv3d, (1, 8, 4, 4, 4), (2, 8, 2, 2, 2), {}),
    "transposed1d": (F.conv_transpose1d, (2, 8, 9), (8, 6, 3), {"stride": 2}),
    "transposed2d": (
        F.conv_transpose2d,
        (2, 8, 4, 4),
        (8, 3, 3, 3),
        {"groups": 2, "output_padding": 1, "stride": 2},
    ),
    "transposed3d": (F.conv_transpose3d, (1, 8, 3, 3, 3), (8, 2, 2, 2, 2), {}),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CONVS)
def test_convolutions_are_exact(engine: str, case: str) -> None:
    op, x_shape, w_shape, options = CONVS[case]
    dim = 0 if "transposed" in case else 1
    w = sparse(*w_shape, dim=dim)
    x, weight = torch.randn(x_shape), packed(w, dim=dim, engine=engine)
    out = w_shape[1] * options.get("groups", 1) if dim == 0 else w_shape[0]
    for bias in (None, torch.randn(out)):
        assert torch.equal(op(x, weight, bias, **options), op(x, w, bias, **options))


@pytest.mark.parametrize("engine", ENGINES)
def test_channels_last_stays_channels_last(engine: str) -> None:
    dense = nn.Conv2d(16, 8, 3, padding=1)
    nms.nm_prune_(dense.weight.data, "2:4")
    conv = copy.deepcopy(dense)
    conv.weight = freeze(dense.weight.detach(), engine=engine)
    dense, conv = (module.to(memory_format=torch.channels_last) for module in (dense, conv))
    x = torch.randn(2, 16, 9, 7).to(memory_format=torch.channels_last)
    assert conv(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(conv(x), dense(x))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_network_is_exact(engine: str) -> None:
    net, x = pruned_net(), torch.randn(3, 8, 6, 6)
    assert torch.equal(packed_copy(net, engine=engine)(x), net(x))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("grad", [False, True])
def test_matrix_products(engine: str, grad: bool) -> None:
    w = sparse(12, 16)
    weight, b = packed(w, engine=engine), torch.randn(12)
    for batch in ((3,), (2, 3), (2, 3, 5)):
        x = torch.randn(*batch, 16, requires_grad=grad)
        for product in (
            lambda x, w: x @ w.t(),
            lambda x, w: torch.matmul(x, w.T),
            lambda x, w: torch.matmul(x, w.mT),
            lambda x, w: (w @ x.mT).mT,
            lambda x, w: x.mT.mT @ w.transpose(0, 1),
        ):
            got, expected = product(x, weight), product(x, w)
            torch.testing.assert_close(got, expected)
            if grad:
                torch.testing.assert_close(
                    *(torch.autograd.grad(y.sin().sum(), x)[0] for y in (got, expected))
                )
    x = torch.randn(5, 16, requires_grad=grad)
    torch.testing.assert_close(torch.mm(x, weight.t()), torch.mm(x, w.t()))
    torch.testing.assert_close(
        torch.mv(w, x[0].detach()), torch.matmul(weight, x[0].detach().unsqueeze(1)).squeeze(1)
    )
    for beta, alpha in ((1, 1), (0.5, 1), (0, 2)):
        for bias in (b, torch.randn(5, 12)):
            got = torch.addmm(bias, x, weight.t(), beta=beta, alpha=alpha)
            torch.testing.assert_close(got, torch.addmm(bias, x, w.t(), beta=beta, alpha=alpha))


def test_below_torch_function() -> None:
    # What C++ callers and the fused modules do: straight to the dispatcher, with autograd on the way.
    w, b = sparse(12, 8), torch.randn(12, requires_grad=True)
    x = torch.randn(2, 3, 8, requires_grad=True)
    kernel = sparse(6, 8, 3, 3)
    image = torch.randn(2, 8, 5, 5, requires_grad=True)
    with torch._C.DisableTorchFunctionSubclass():
        pairs = [(F.linear(x, packed(w), b), F.linear(x, w, b))]
        pairs.append((F.conv2d(image, packed(kernel), padding=1), F.conv2d(image, kernel, padding=1)))
    for got, expected in pairs:
        torch.testing.assert_close(got, expected)
        leaves = [
            t for t in (x, b, image) if t is not (image if got.dim() == 3 else x) and t.dim() != got.dim() - 3
        ]
        leaves = [x, b] if got.dim() == 3 else [image]
        for a, e in zip(*(torch.autograd.grad(y.sin().sum(), leaves) for y in (got, expected)), strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("same_size", [True, False], ids=["in_proj", "qkv_proj"])
def test_attention(same_size: bool) -> None:
    sizes = {} if same_size else {"kdim": 8, "vdim": 12}
    dense = nn.MultiheadAttention(16, 4, batch_first=True, **sizes).eval()
    names = ("in_proj_weight",) if same_size else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    module = copy.deepcopy(dense)
    for name in names:
        nms.nm_prune_(getattr(dense, name).data, "2:4")
        setattr(module, name, freeze(getattr(dense, name).detach()))
    nms.nm_prune_(dense.out_proj.weight.data, "2:4")
    module.out_proj.weight = freeze(dense.out_proj.weight.detach())
    q, k, v = (
        torch.randn(2, 5, 16),
        torch.randn(2, 7, sizes.get("kdim", 16)),
        torch.randn(2, 7, sizes.get("vdim", 16)),
    )
    calls = [(q, k, v), (q, q, q), (q, k, k)] if same_size else [(q, k, v)]
    for inputs, grad in itertools.product(calls, (True, False)):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(module(*inputs)[0], dense(*inputs)[0])


@pytest.mark.parametrize("training", [True, False])
def test_transformer_layer(training: bool) -> None:
    dense = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).train(training)
    layer = copy.deepcopy(dense)
    for owner, name in (
        ("self_attn", "in_proj_weight"),
        ("self_attn.out_proj", "weight"),
        ("linear1", "weight"),
        ("linear2", "weight"),
    ):
        w = getattr(dense.get_submodule(owner), name)
        nms.nm_prune_(w.data, "2:4")
        setattr(layer.get_submodule(owner), name, freeze(w.detach()))
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(layer(x), dense(x))
    with torch.no_grad():  # in eval mode PyTorch would take its fused path
        torch.testing.assert_close(layer(x), dense(x))
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), dense(x))


# -------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_reach_input_and_bias(engine: str) -> None:
    net = pruned_net()
    frozen = packed_copy(net, engine=engine)
    x = torch.randn(3, 8, 6, 6)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for module, leaf in zip((net, frozen), inputs, strict=True):
        module(leaf).square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    torch.testing.assert_close(frozen.fc1.bias.grad, net.fc1.bias.grad)
    torch.testing.assert_close(frozen.conv.bias.grad, net.conv.bias.grad)
    assert frozen.fc1.weight.grad is None
    torch.optim.SGD(frozen.parameters(), lr=0.1, momentum=0.9).step()  # steps over frozen weights


def test_weights_are_frozen() -> None:
    weight = packed(sparse(4, 8))
    for attempt in (
        lambda: nn.Parameter(weight),
        lambda: weight.requires_grad_(),
        lambda: setattr(weight, "requires_grad", True),
        lambda: nn.Linear(8, 4).requires_grad_(False).register_parameter("w", nn.Parameter(weight)),
    ):
        with pytest.raises(NotImplementedError, match="frozen"):
            attempt()
    parameter = nn.Parameter(weight, requires_grad=False)
    assert isinstance(parameter, nn.Parameter)
    assert isinstance(parameter, NMTensor)
    assert not parameter.requires_grad_(False).requires_grad


def test_values_are_differentiable() -> None:
    w = sparse(4, 8, dtype=torch.float64).requires_grad_()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: nms.linear(x, packed(w.detach())), (x,))
    mask = w.detach() != 0
    nms.linear(x, nms.compress(w, "2:4")).sin().sum().backward()
    expected = torch.autograd.grad(F.linear(x, w).sin().sum(), w)[0]
    torch.testing.assert_close(w.grad, expected * mask)


# ---------------------------------------------------------------------------------------------------- engines


@pytest.fixture
def _engine_table() -> Iterator[None]:
    saved = dict(engines.ENGINES)
    yield
    engines.ENGINES.clear()
    engines.ENGINES.update(saved)


@pytest.mark.usefixtures("_engine_table")
def test_engine_table() -> None:
    calls = []

    def linear(input: Tensor, weight: NMTensor, bias: Tensor | None = None) -> Tensor:
        calls.append(weight.form_twice.shape)
        return F.linear(input, engines.unpack_rows(weight), bias)

    def why_not(weight: NMTensor) -> str | None:
        return None if weight.values.dtype == torch.float32 else "only float32"

    engine = engines.Engine(
        "test",
        why_not,
        linear,
        engines.ENGINES["decompress"].conv,
        forms=("twice",),
        build=lambda weight: (torch.cat([weight.values, weight.values]),),
    )
    engines.register_engine(engine, first=True)
    with pytest.raises(ValueError, match="already"):
        engines.register_engine(engine)
    w = sparse(12, 8)
    weight = packed(w)
    assert weight.engine == "test"
    assert weight.engine_nbytes == 2 * weight.values.nbytes
    x = torch.randn(2, 8)
    assert torch.equal(F.linear(x, weight), F.linear(x, w))
    torch.testing.assert_close(x @ weight.t(), x @ w.t())
    assert calls == [(24, 4), (24, 4)]
    # Pieces have no form of their own, and another dtype no such engine: both run on one that fits.
    assert weight.split(4)[0].engine == "decompress"
    assert weight.half().engine == packed(w.half()).engine != "test"
    assert weight.half().float().with_engine(None).engine == "test"
    assert weight.detach().form_twice.data_ptr() == weight.form_twice.data_ptr()
    with pytest.raises(ValueError, match="cannot run this weight: only float32"):
        packed(w.double(), engine="test")
    saved = pickle.dumps(weight)
    del engines.ENGINES["test"]
    assert pickle.loads(saved).engine == packed(w).engine
    with pytest.raises(ValueError, match=r"'decompress', 'dense'.*, got 'test'"):
        packed(w, engine="test")
