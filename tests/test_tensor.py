"""NMTensor in the place of a dense weight: same results, nothing densified, the rest refused by name."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from torch import Tensor, nn

import nmsparse_ext as nms
from nmsparse_ext import engines
from nmsparse_ext.tensor import NMTensor

PATTERNS = ("2:4", "1:4", "4:8", "1:16", "3:7", "5:32", "1:1")
ENGINES = ("decompress", "dense")


def sparse(*shape: int, pattern: str = "2:4", dim: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random dense weight that satisfies a pattern."""
    return nms.nm_prune(torch.randn(shape).to(dtype), pattern, dim=dim)


def packed(w: Tensor, pattern: str = "2:4", dim: int = 1, engine: str | None = None) -> NMTensor:
    return nms.compress(w, pattern, dim=dim).with_engine(engine)


def freeze(w: Tensor, pattern: str = "2:4", dim: int = 1, engine: str | None = None) -> nn.Parameter:
    return nn.Parameter(packed(w, pattern, dim, engine), requires_grad=False)


class Net(nn.Module):
    """One of each kind that runs packed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1, stride=2)
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(F.relu(self.conv(x)).mean((2, 3)))))


def pruned_net(pattern: str = "2:4") -> Net:
    net = Net()
    for module in (net.conv, net.fc1, net.fc2):
        nms.nm_prune_(module.weight.data, pattern)
    return net


def packed_copy(net: Net, pattern: str = "2:4", engine: str | None = None) -> Net:
    net = copy.deepcopy(net)
    for module in (net.conv, net.fc1, net.fc2):
        module.weight = freeze(module.weight.detach(), pattern, engine=engine)
    return net


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


# ------------------------------------------------------------------------------------------------------ views


@pytest.mark.parametrize("engine", ENGINES)
def test_views_share_memory(engine: str) -> None:
    w = sparse(12, 16)
    weight = packed(w, engine=engine)
    views = [
        (weight.t(), w.t()),
        (weight.T.T, w),
        (weight.permute(1, 0), w.t()),
        (weight.transpose(-1, 0), w.t()),
        (weight.view(12, -1), w),
        (weight.reshape(12, 16), w),
        (weight.contiguous(), w),
        (weight.expand(3, 12, 16), w.expand(3, 12, 16)),
        (weight.expand(2, 3, 12, 16).reshape(6, 12, 16), w.expand(6, 12, 16)),
        (weight[2:5], w[2:5]),
        (weight.t()[:, 2:5], w.t()[:, 2:5]),
        *zip(weight.split(5), w.split(5), strict=True),
        *zip(weight.split([3, 9]), w.split([3, 9]), strict=True),
        *zip(weight.chunk(3), w.chunk(3), strict=True),
        *zip(weight.t().split(4, dim=1), w.t().split(4, dim=1), strict=True),
        (weight.detach(), w),
        (weight.data, w),
    ]
    x = torch.randn(2, 3, 5)
    for view, expected in views:
        assert isinstance(view, NMTensor)
        assert view.engine == engine
        assert view.shape == expected.shape
        assert torch.equal(view.to_dense(), expected)
        assert view.values.untyped_storage().data_ptr() == weight.values.untyped_storage().data_ptr()
        for form, source in zip(view.forms(), weight.forms(), strict=True):
            assert form.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
        if view.dim() == 2:
            x = torch.randn(3, expected.shape[1])
            torch.testing.assert_close(F.linear(x, view), F.linear(x, expected))


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.split(4, dim=1),
        lambda w: w[:, 2:8],
        lambda w: w[::2],
        lambda w: w.view(24, 8),
        lambda w: w.reshape(-1),
        lambda w: w.expand(2, 24, 16),
        lambda w: w.expand(2, 12, 16).permute(1, 0, 2),
        lambda w: w.unsqueeze(0),
    ],
)
def test_other_views_are_refused_by_name(view: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NotImplementedError, match=r"NMTensor does not support aten\..*to_dense"):
        view(packed(sparse(12, 16)))


UNSUPPORTED: dict[str, Callable[[Tensor], object]] = {
    "aten.add": lambda w: w + 1,
    "aten.mul_": lambda w: w.mul_(2),
    "aten.zero_": lambda w: w.zero_(),
    "aten.abs": lambda w: w.abs(),
    "aten.sum": lambda w: w.sum(),
    "aten.eq": lambda w: w == w,
    "aten.equal": lambda w: torch.equal(w, w),
    "aten.select": lambda w: w[0],
    "aten.unbind": list,
    "aten.empty_like": torch.empty_like,
    "aten.cat": lambda w: torch.cat([w, w]),
    "aten.embedding": lambda w: F.embedding(torch.tensor([1]), w),
    "aten._to_copy.default to torch.int32": lambda w: w.int(),
    "aten._to_sparse": lambda w: w.to_sparse(),
    "aten.mm": lambda w: w @ w.t(),
    "F.linear": lambda w: F.linear(w, torch.randn(3, 8)),
    "F.conv1d": lambda w: F.conv1d(w, torch.randn(3, 4, 1)),
    "numpy": lambda w: w.numpy(),
    "tolist": lambda w: w.tolist(),
    "share_memory_": lambda w: w.share_memory_(),
    "pinned": lambda w: w.pin_memory(),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_nothing_densifies_silently(name: str) -> None:
    with pytest.raises(NotImplementedError) as caught:
        UNSUPPORTED[name](packed(sparse(4, 8)))
    message = str(caught.value)
    if name != "pinned":
        assert name in message
    assert "to_dense" in message


def test_share_memory_of_a_module_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="share_memory_"):
        packed_copy(pruned_net()).share_memory()


# -------------------------------------------------------------------------------------- copies, moves, saving


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "clone"])
def test_copies_are_equal_and_separate(engine: str, how: str) -> None:
    w = sparse(4, 8)
    parameter = freeze(w, engine=engine)
    if how == "deepcopy":
        other = copy.deepcopy(parameter)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(parameter))
    elif how == "clone":
        other = nn.Parameter(parameter.clone(), requires_grad=False)
    else:
        file = io.BytesIO()
        torch.save(parameter, file)
        file.seek(0)
        other = torch.load(file, weights_only=True)
    assert isinstance(other, NMTensor)
    assert isinstance(other, nn.Parameter)
    assert not other.requires_grad
    assert (other.pattern, other.group_dim, other.remainder, other.engine) == (
        parameter.pattern,
        parameter.group_dim,
        parameter.remainder,
        engine,
    )
    assert torch.equal(other.to_dense(), w)
    for mine, theirs in zip(
        (parameter.values, *parameter.forms()), (other.values, *other.forms()), strict=True
    ):
        assert mine.data_ptr() != theirs.data_ptr()


def test_engine_forms_are_not_saved() -> None:
    sizes = []
    for engine in ENGINES:
        file = io.BytesIO()
        torch.save(packed(sparse(64, 64), engine=engine), file)
        sizes.append(len(file.getvalue()))
    assert abs(sizes[0] - sizes[1]) < 200


def test_another_process_loads_with_the_package_imported(tmp_path: Path) -> None:
    torch.save({"w": packed(sparse(4, 8))}, tmp_path / "w.pt")
    code = "import sys, torch, nmsparse_ext; print(torch.load(sys.argv[1], weights_only=True)['w'].pattern)"
    command = [sys.executable, "-c", code, str(tmp_path / "w.pt")]
    root = Path(__file__).parents[1]
    assert subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout == "2:4\n"


def test_a_damaged_pickle_is_refused() -> None:
    weight = packed(sparse(4, 8))
    weight.indices.fill_(0xFF)
    with pytest.raises(ValueError, match="no legal choice"):
        pickle.loads(pickle.dumps(weight))


class HandMade:
    """Pickles as a call of the class itself, past the checks of ``from_packed``."""

    def __reduce__(self) -> tuple:
        values, indices = torch.ones(4, 4), torch.full((4, 1), 0xFF, dtype=torch.uint8)
        return NMTensor, (values, indices, "2:4", 1, (4, 8), "error", "decompress", ())


def test_torch_load_lets_nobody_go_around_the_checks() -> None:
    file = io.BytesIO()
    torch.save(HandMade(), file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="NMTensor"):
        torch.load(file, weights_only=True)


def test_moves_between_dtypes_and_devices() -> None:
    w = sparse(4, 8)
    for engine in ENGINES:
        weight = packed(w, engine=engine)
        half = weight.to(torch.bfloat16)
        assert (half.dtype, half.values.dtype, half.indices.dtype) == (
            torch.bfloat16,
            torch.bfloat16,
            torch.uint8,
        )
        assert half.engine == engine
        assert all(form.dtype == torch.bfloat16 for form in half.forms())
        assert torch.equal(half.to_dense(), w.to(torch.bfloat16))
        x = torch.randn(2, 8, dtype=torch.bfloat16)
        assert torch.equal(F.linear(x, half), F.linear(x, w.to(torch.bfloat16)))
        assert weight.to("cpu") is weight
        meta = weight.to("meta")
        assert meta.device.type == "meta"
        assert meta.nbytes == weight.nbytes
        assert F.linear(x.float().to("meta"), meta).shape == (2, 4)


def test_modules_move() -> None:
    net = pruned_net()
    frozen = packed_copy(net)
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(frozen.double()(x.double()), net.double()(x.double()))
    assert isinstance(frozen.fc1.weight, nn.Parameter)
    assert frozen.fc1.weight.dtype == torch.float64


def test_values_that_underflow_stay_legal() -> None:
    weight = packed(sparse(4, 8) * 1e-30).to(torch.float16)
    assert not weight.to_dense().any()
    assert torch.equal(weight.indices, packed(sparse(4, 8)).indices) or weight.indices.shape == (4, 1)


@pytest.mark.parametrize("engine", ENGINES)
def test_copy_into_a_packed_weight(engine: str) -> None:
    a, b = sparse(4, 8), sparse(4, 8)
    x = torch.randn(3, 8)
    for source in (
        b,
        packed(b),
        packed(b, engine="dense"),
        nms.compress(b, "4:8"),
        b.double(),
        b.t().contiguous().t(),
    ):
        weight = packed(a, engine=engine)
        address = weight.values.data_ptr()
        assert weight.copy_(source) is weight
        assert weight.pattern == nms.Pattern(2, 4)
        assert weight.values.data_ptr() == address
        assert torch.equal(weight.to_dense(), b)
        assert torch.equal(F.linear(x, weight), F.linear(x, b))
    with pytest.raises(ValueError, match="does not satisfy 2:4"):
        packed(a).copy_(torch.ones(4, 8))
    with pytest.raises(ValueError, match=r"shape \[8, 4\] into an NMTensor of shape \[4, 8\]"):
        packed(a).copy_(b.t())
    dense = torch.empty(4, 8)
    assert dense.copy_(packed(b)) is dense
    assert torch.equal(dense, b)


def test_state_dicts_in_all_directions() -> None:
    source, x = pruned_net(), torch.randn(2, 8, 6, 6)
    for saved, target, assign in (
        (packed_copy(source), packed_copy(pruned_net()), False),
        (packed_copy(source), pruned_net(), False),
        (source, packed_copy(pruned_net()), False),
        (packed_copy(source), pruned_net().requires_grad_(False), True),
    ):
        file = io.BytesIO()
        torch.save(saved.state_dict(), file)
        file.seek(0)
        before = type(target.fc1.weight)
        target.load_state_dict(torch.load(file, weights_only=True), assign=assign)
        assert type(target.fc1.weight) is (NMTensor if assign else before)
        torch.testing.assert_close(target(x), source(x))
    with pytest.raises(RuntimeError, match="does not satisfy 2:4"):
        packed_copy(pruned_net()).load_state_dict(Net().state_dict())


# ---------------------------------------------------------------------------------- compile, export, autocast


@pytest.fixture
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("engine", ENGINES)
def test_compile_without_graph_breaks(engine: str) -> None:
    net = pruned_net()
    frozen = packed_copy(net, engine=engine)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    torch.testing.assert_close(compiled(x), net(x))
    torch.testing.assert_close(*(torch.autograd.grad(m(x).sin().sum(), x)[0] for m in (compiled, net)))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x))
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x.detach()), net(x.detach()))


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_inductor() -> None:
    net, x = pruned_net(), torch.randn(2, 8, 6, 6)
    compiled = torch.compile(packed_copy(net), fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_attention_and_products() -> None:
    dense = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    nms.nm_prune_(dense.in_proj_weight.data, "2:4")
    module = copy.deepcopy(dense)
    module.in_proj_weight = freeze(dense.in_proj_weight.detach())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    q, k = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    for inputs in ((q, q, q), (q, k, k)):
        torch.testing.assert_close(compiled(*inputs)[0], dense(*inputs)[0])
    w = sparse(12, 16)
    weight = packed(w)
    product = torch.compile(lambda x: x @ weight.t(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(product(q), q @ w.t())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_export(engine: str, strict: bool) -> None:
    net, x = pruned_net().eval(), torch.randn(2, 8, 6, 6)
    program = torch.export.export(packed_copy(net, engine=engine).eval(), (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), net(x))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), net(x))


@pytest.mark.parametrize("engine", ENGINES)
def test_autocast(engine: str) -> None:
    net, x = pruned_net(), torch.randn(2, 8, 6, 6)
    frozen = packed_copy(net, engine=engine)
    w, y = sparse(4, 8), torch.randn(2, 8)
    weight = packed(w, engine=engine)
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen(x).dtype == torch.bfloat16
        assert torch.equal(frozen(x), net(x))
        assert torch.equal(y @ weight.t(), y @ w.t())


def test_meta_and_fake_weights() -> None:
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False):
        weight = NMTensor.from_packed(
            torch.empty(4, 4), torch.empty(4, 1, dtype=torch.uint8), "2:4", group_dim=1, shape=(4, 8)
        )
        assert F.linear(torch.empty(3, 8), weight).shape == (3, 4)
        assert "NMTensor" in repr(weight)


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
