"""keep="engine": only what the engine multiplies with is held, and nothing else changes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from samples import assert_same_bits
from torch import Tensor, nn

import nmsparse_ext as nms
from nmsparse_ext import deploy, engines_cpu, ops
from nmsparse_ext._build import extension
from nmsparse_ext.tensor import NMTensor, inner_tensors

pytestmark = pytest.mark.skipif(extension is None, reason="panels are for the compiled extension")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATTERNS = ("2:4", "1:4", "2:8", "1:16", "8:16", "5:7", "3:4")


def both_and_alone(
    rows: int = 48, k: int = 64, pattern: str = "2:4", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, NMTensor, NMTensor]:
    """A weight dense, packed, and as panels alone."""
    w = nms.nm_prune(torch.randn(rows, k), pattern, remainder="pad").to(dtype)
    both = nms.compress(w, pattern, remainder="pad")
    return w, both, both.with_engine("cpu-panels", keep="engine")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.fc1 = nn.Linear(32, 64)
        self.fc2 = nn.Linear(64, 16, bias=False)
        self.tied = nn.Linear(64, 16)
        self.tied.weight = self.fc2.weight

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.fc1(x + self.attention(x, x, x)[0]))
        return self.fc2(h) + self.tied(h)


def nets() -> tuple[Net, Net]:
    """A pruned network, dense and with panels alone."""
    net = Net().eval()
    names = ("attention.in_proj_weight", "attention.out_proj.weight", "fc1.weight", "fc2.weight")
    for name in names:
        nms.nm_prune_(net.get_parameter(name).data, "2:4")
    packed = nms.convert(copy.deepcopy(net), policy="always", keep="engine")
    for name in names:
        assert packed.get_parameter(name).keep == "engine"
    return net, packed


def fail_to_unpack(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on whoever makes a dense weight or the packed form fails."""

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("unpacked on a hot path")

    monkeypatch.setattr(ops, "unpack", fail)
    for name in ("panel_restore", "panel_unpack", "panel_pack"):
        monkeypatch.setattr(engines_cpu, name, fail)


# ----------------------------------------------------------------------------------------------- what is held


def storage_bytes(weight: NMTensor) -> int:
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage() for part in inner_tensors(weight)}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(
    ("pattern", "dtype", "fraction"),
    [
        ("2:4", torch.float32, 0.5 + 2 * 2 / 128),
        ("2:4", torch.bfloat16, 0.5 + 2 * 2 / 64),
        ("1:4", torch.float32, 0.25 + 2 / 128),
        ("1:8", torch.float32, 0.125 + 4 / 256),
        ("1:16", torch.bfloat16, 1 / 16 + 4 / 256),
    ],
)
def test_memory_is_that_of_one_form(pattern: str, dtype: torch.dtype, fraction: float) -> None:
    _, both, alone = both_and_alone(64, 256, pattern, dtype)
    dense_bytes = 64 * 256 * dtype.itemsize
    assert storage_bytes(alone) == alone.nbytes == alone.engine_nbytes == alone.held_nbytes
    assert storage_bytes(both) == both.nbytes + both.engine_nbytes == both.held_nbytes
    assert alone.nbytes == fraction * dense_bytes
    assert (both.keep, alone.keep) == ("both", "engine")
    assert "keep='engine'" in repr(alone)


def test_a_model_takes_the_memory_of_one_form() -> None:
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 256, bias=False))
    for layer in model:
        nms.nm_prune_(layer.weight.data, "2:4")
    dense_bytes = sum(layer.weight.nbytes for layer in model)
    nms.convert(model, policy="always", keep="engine")
    held = sum(storage_bytes(layer.weight) for layer in model)
    assert held == 0.53125 * dense_bytes == deploy.report(model).bytes
    assert [row.held_bytes for row in nms.summary(model)] == [storage_bytes(m.weight) for m in model]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_packed_form_comes_back_bit_for_bit(pattern: str, dtype: torch.dtype) -> None:
    for rows, k in ((48, 64), (37, 50), (1, 16)):
        w, both, alone = both_and_alone(rows, k, pattern, dtype)
        assert alone.packed_values is None
        assert_same_bits(alone.values, both.values)
        assert_same_bits(alone.indices, both.indices)
        assert_same_bits(alone.to_dense(), w)
        assert_same_bits(alone.with_engine("decompress").to_dense(), w)
        x = torch.randn(5, k).to(dtype)
        assert_same_bits(F.linear(x, alone), F.linear(x, both))


def test_zeros_that_are_kept_stay_where_they_were() -> None:
    """The dense weight does not say where they stood."""
    values = torch.tensor([[0.0, 1.0, -0.0, 0.0], [float("nan"), -0.0, 2.0, 3.0]])
    indices = torch.tensor([[0b11_10_11_01], [0b11_01_11_10]], dtype=torch.uint8)
    weight = NMTensor.from_packed(values, indices, "2:4", group_dim=1, shape=(2, 8))
    alone = weight.with_engine("cpu-panels", keep="engine")
    assert_same_bits(alone.values, values)
    assert_same_bits(alone.indices, indices)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_convolutions(pattern: str, dtype: torch.dtype) -> None:
    m = nms.Pattern.parse(pattern).m
    for shape in ((18, 2 * m, 3, 3), (16, m, 1, 1), (5, 3 * m, 2), (4, m, 1, 2, 2)):
        w = nms.nm_prune(torch.randn(shape), pattern).to(dtype)
        both = nms.compress(w, pattern)
        assert both.engine == "cpu-conv-panels"
        alone = both.with_engine(None, keep="engine")
        assert storage_bytes(alone) == alone.nbytes < storage_bytes(both)
        assert_same_bits(alone.values, both.values)
        assert_same_bits(alone.indices, both.indices)
        assert_same_bits(alone.to_dense(), w)
        x = torch.randn(2, shape[1], *(size + 2 for size in shape[2:])).to(dtype)
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(shape) - 3]
        assert_same_bits(conv(x, alone), conv(x, both))


def test_what_cannot_be_kept_alone() -> None:
    w = nms.nm_prune(torch.randn(16, 32), "2:4")
    with pytest.raises(ValueError, match="keep must be 'both' for engine 'dense'"):
        nms.compress(w, "2:4").with_engine("dense", keep="engine")
    with pytest.raises(ValueError, match="keep must be one of"):
        nms.compress(w, "2:4").with_engine(None, keep="dense")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep must be one of"):
        nms.convert(nn.Sequential(nn.Linear(8, 8)), keep="nothing")
    with pytest.raises(ValueError, match="values take gradients"):
        nms.compress(w.requires_grad_(), "2:4").with_engine("cpu-panels", keep="engine")
    # An engine without a form of its own multiplies with the packed form.
    assert nms.compress(w.detach(), "2:4").with_engine("decompress", keep="engine").keep == "both"


# ------------------------------------------------------------------------------------------------- hot paths


def test_nothing_is_unpacked_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    net, packed = nets()
    conv1d_weight = nms.nm_prune(torch.randn(64, 48), "2:4", dim=0)
    conv1d = nms.compress(conv1d_weight, "2:4", dim=0).with_engine("cpu-panels", keep="engine")
    fail_to_unpack(monkeypatch)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), net(x))
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), net(x))
    torch.testing.assert_close(packed(x.requires_grad_()), net(x))
    weight, y = packed.fc1.weight, torch.randn(3, 32)
    for product in (
        lambda w: y @ w.t(),
        lambda w: torch.addmm(torch.ones(64), y, w.t()),
        lambda w: (w @ y.t()).t(),
        lambda w: torch.matmul(y.expand(2, 3, 32), w.mT),
        lambda w: torch.cat([F.linear(y, piece) for piece in w.split(16)], dim=1),
        lambda w: F.linear(y, w[16:48]),
        lambda w: F.linear(y, w.detach()),
    ):
        torch.testing.assert_close(product(weight), product(net.fc1.weight.detach()))
    # transformers' Conv1D: addmm(bias, x, weight [in, out])
    z, bias = torch.randn(3, 64), torch.randn(48)
    torch.testing.assert_close(torch.addmm(bias, z, conv1d), torch.addmm(bias, z, conv1d_weight))
    torch.testing.assert_close(z @ conv1d, z @ conv1d_weight)
    with torch._C.DisableTorchFunctionSubclass():
        torch.testing.assert_close(torch.addmm(bias, z, conv1d), torch.addmm(bias, z, conv1d_weight))


def test_gradients() -> None:
    net, packed = nets()
    inputs = [torch.randn(2, 5, 32).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    for module, x in zip((net, packed), inputs, strict=True):
        module(x).square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed.fc1.bias.grad, net.fc1.bias.grad)


# ------------------------------------------------------------------------------------- copies, moves, saving


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "clone"])
def test_copies_are_equal_and_separate(how: str) -> None:
    w, _, alone = both_and_alone()
    parameter = nn.Parameter(alone, requires_grad=False)
    parameter.note = ["kept"]
    copies: dict[str, Callable[[], Tensor]] = {
        "deepcopy": lambda: copy.deepcopy(parameter),
        "pickle": lambda: pickle.loads(pickle.dumps(parameter)),
        "clone": lambda: nn.Parameter(parameter.clone(), requires_grad=False),
    }
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(parameter, file)
        file.seek(0)
        other = torch.load(file, weights_only=True)
    else:
        other = copies[how]()
    assert isinstance(other, NMTensor)
    assert isinstance(other, nn.Parameter)
    assert (other.keep, other.engine) == ("engine", "cpu-panels")
    assert_same_bits(other.to_dense(), w)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(other.forms(), alone.forms(), strict=True))
    if how == "deepcopy":
        assert other.note == ["kept"]
        assert other.note is not parameter.note


def test_state_dicts_in_all_directions() -> None:
    source, alone = nets()
    x = torch.randn(2, 5, 32)
    both = nms.convert(copy.deepcopy(source), policy="always")
    for saved in (source, both, alone):
        file = io.BytesIO()
        torch.save(saved.state_dict(), file)
        for kind in ("dense", "both", "engine"):
            for assign in (False, True):
                target = nets()[0].requires_grad_(False)
                if kind != "dense":
                    target = nms.convert(target, policy="always", keep=kind)
                file.seek(0)
                target.load_state_dict(torch.load(file, weights_only=True), assign=assign)
                torch.testing.assert_close(target(x), source(x))
                like = saved if assign else target
                held = [getattr(model.fc1.weight, "keep", "dense") for model in (target, like)]
                assert held[0] == held[1]


@pytest.mark.parametrize("keep", [None, "both", "engine"])
def test_files(tmp_path: Path, keep: str | None) -> None:
    source, alone = nets()
    x = torch.randn(2, 5, 32)
    nms.save_file(alone, tmp_path / "alone.safetensors")
    nms.save_file(source, tmp_path / "dense.safetensors")
    loaded, expected = (nms.load_file(tmp_path / f"{name}.safetensors") for name in ("alone", "dense"))
    assert loaded.keys() == expected.keys()
    assert_same_bits(loaded["fc1.weight"].values, expected["fc1.weight"].values)
    assert_same_bits(loaded["fc1.weight"].indices, expected["fc1.weight"].indices)
    assert loaded["fc2.weight"] is loaded["tied.weight"]
    for target in (Net().eval(), nets()[1]):
        held = keep or getattr(target.fc1.weight, "keep", "both")
        nms.load_into(target, tmp_path / "alone.safetensors", keep=keep)
        assert target.fc1.weight.keep == held
        assert target.fc2.weight is target.tied.weight
        torch.testing.assert_close(target(x), source(x))
    with pytest.raises(ValueError, match="keep must be"):
        nms.load_into(Net(), tmp_path / "alone.safetensors", keep="all")


def test_moves() -> None:
    w, _, alone = both_and_alone()
    half = alone.to(torch.bfloat16)
    assert (half.keep, half.dtype, half.engine) == ("engine", torch.bfloat16, "cpu-panels")
    assert_same_bits(half.to_dense(), w.to(torch.bfloat16))
    double = alone.double()  # which has no fast kernels, so the packed form is what is multiplied
    assert (double.keep, double.dtype) == ("both", torch.float64)
    assert_same_bits(double.to_dense(), w.double())
    assert alone.to("cpu") is alone
    meta = alone.to("meta")
    assert meta.device.type == "meta"
    assert F.linear(torch.empty(3, 64, device="meta"), meta).shape == (3, 48)


def test_copy_into_it() -> None:
    x = torch.randn(3, 64)
    _, _, alone = both_and_alone()
    target = alone.clone()
    for _ in range(2):
        w, both, other = both_and_alone()
        for source in (w, both, other, nms.compress(w, "4:8"), w.double()):
            target.copy_(torch.zeros(48, 64))
            addresses = [form.data_ptr() for form in target.forms()]
            assert target.copy_(source) is target
            assert [form.data_ptr() for form in target.forms()] == addresses
            assert_same_bits(target.to_dense(), w)
            torch.testing.assert_close(F.linear(x, target), F.linear(x, w))
    with pytest.raises(ValueError, match="does not satisfy 2:4"):
        target.copy_(torch.ones(48, 64))


# ------------------------------------------------------------------------------------------------------ views


def test_views() -> None:
    w, _, alone = both_and_alone(56, 32)
    for view, expected in (
        (alone.t(), w.t()),
        (alone.t().t(), w),
        (alone.expand(3, 56, 32), w.expand(3, 56, 32)),
        (alone.detach(), w),
        (alone.view(56, -1), w),
        (alone[16:48], w[16:48]),
        *zip(alone.split(16), w.split(16), strict=True),
        *zip(alone.split([32, 24]), w.split([32, 24]), strict=True),
        *zip(alone.t().split([32, 24], dim=1), w.t().split([32, 24], dim=1), strict=True),
    ):
        assert isinstance(view, NMTensor)
        assert (view.keep, view.engine) == ("engine", "cpu-panels")
        assert_same_bits(view.to_dense(), expected.contiguous())
        for form, whole in zip(view.forms(), alone.forms(), strict=True):
            assert form.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_pieces_that_cut_panels_are_copies() -> None:
    w, _, alone = both_and_alone(56, 32)
    x = torch.randn(3, 32)
    for piece, expected in zip(alone.split([8, 40, 8]), w.split([8, 40, 8]), strict=True):
        assert_same_bits(piece.to_dense(), expected)
        torch.testing.assert_close(F.linear(x, piece), F.linear(x, expected))
    with pytest.raises(ValueError, match="it is a copy"):
        alone[8:24].copy_(w[8:24])
    alone[16:32].copy_(w[:16])  # whole panels are not
    assert_same_bits(alone.to_dense()[16:32], w[:16])


# ---------------------------------------------------------------------------------- compile, export, autocast


def test_compile_and_export() -> None:
    torch.compiler.reset()
    net, packed = nets()
    x = torch.randn(2, 5, 32)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x))
    x.requires_grad_()
    torch.testing.assert_close(*(torch.autograd.grad(m(x).sin().sum(), x)[0] for m in (compiled, net)))
    for strict in (False, True):
        program = torch.export.export(packed, (x.detach(),), strict=strict)
        torch.testing.assert_close(program.module()(x), net(x))
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        torch.testing.assert_close(torch.export.load(file).module()(x), net(x))


def test_autocast() -> None:
    net, packed = nets()
    x = torch.randn(2, 5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = net(x)
        for _ in range(2):
            actual = packed(x)
            assert actual.dtype == expected.dtype
            torch.testing.assert_close(actual, expected, atol=5e-2, rtol=5e-2)
