"""The short way of a linear layer without gradients: one call of an op that autograd passes over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import nmsparse_ext as nms
from nmsparse_ext._build import extension

PANEL_LINEAR = torch.ops.nmsparse.panel_linear
needs_panels = pytest.mark.skipif(extension is None, reason="panels are for the compiled extension")


class Calls(TorchDispatchMode):
    """Notes which ops run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def weight() -> nms.NMTensor:
    torch.manual_seed(0)
    return nms.compress(torch.randn(20, 32), "2:4", prune=True)


def arguments(weight: nms.NMTensor, bias: bool = True) -> tuple[Any, ...]:
    """Of the op, for a few rows of x."""
    values, indices = weight.packed_values, weight.packed_indices
    panels = torch.ops.nmsparse.panel_pack(values, indices, 2, 4, 32)
    return torch.randn(3, 32), *panels, torch.randn(20) if bias else None, 2, 4, 20, 32, "relu"


@pytest.mark.parametrize("bias", [False, True])
def test_both_overloads_are_the_same_op(weight: nms.NMTensor, bias: bool) -> None:
    call = arguments(weight, bias)
    assert torch.equal(PANEL_LINEAR.without_gradients(*call), PANEL_LINEAR.default(*call))
    own, other = (str(op._schema) for op in (PANEL_LINEAR.without_gradients, PANEL_LINEAR.default))
    assert own == other.replace("panel_linear(", "panel_linear.without_gradients(")


@pytest.mark.parametrize("test", ["test_schema", "test_faketensor", "test_aot_dispatch_static"])
def test_opcheck(weight: nms.NMTensor, test: str) -> None:
    torch.library.opcheck(PANEL_LINEAR.without_gradients, arguments(weight), test_utils=test)


@needs_panels
def test_its_result_takes_no_gradients(weight: nms.NMTensor) -> None:
    x, *rest = arguments(weight)
    assert not PANEL_LINEAR.without_gradients(x.requires_grad_(), *rest).requires_grad


@needs_panels
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("bias", [None, torch.arange(20.0)])
def test_without_gradients_it_is_one_op(weight: nms.NMTensor, mode: Any, bias: Tensor | None) -> None:
    x = torch.randn(3, 32, requires_grad=True)
    expected = F.linear(x, weight, bias)
    with mode(), Calls() as calls:
        y = F.linear(x, weight, bias)
    assert calls.seen == [PANEL_LINEAR.without_gradients]
    assert not y.requires_grad
    assert torch.equal(y, expected)


@needs_panels
def test_with_gradients_it_is_the_op_that_has_them(weight: nms.NMTensor) -> None:
    x = torch.randn(3, 32, requires_grad=True)
    with Calls() as calls:
        F.linear(x, weight).sum().backward()
    assert PANEL_LINEAR.default in calls.seen
    assert PANEL_LINEAR.without_gradients not in calls.seen
    assert x.grad is not None


@needs_panels
@torch.no_grad()
@pytest.mark.parametrize("shape", [(), (1,), (3, 20), (1, 20)])
def test_biases_that_broadcast(weight: nms.NMTensor, shape: tuple[int, ...]) -> None:
    x, bias = torch.randn(3, 32), torch.randn(shape)
    torch.testing.assert_close(F.linear(x, weight, bias), F.linear(x, weight) + bias)


@torch.no_grad()
def test_writes_are_seen(weight: nms.NMTensor) -> None:
    x = torch.randn(3, 32)
    before = F.linear(x, weight)
    weight.values.mul_(2)
    torch.testing.assert_close(F.linear(x, weight), 2 * before)


@torch.no_grad()
def test_autocast_rounds(weight: nms.NMTensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(torch.randn(3, 32), weight).dtype == torch.bfloat16


@torch.no_grad()
def test_forward_derivatives_are_not_lost(weight: nms.NMTensor) -> None:
    x, tangent = torch.randn(3, 32), torch.randn(3, 32)
    with forward_ad.dual_level():
        y = F.linear(forward_ad.make_dual(x, tangent), weight)
        got = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(got, tangent @ weight.to_dense().T)


@torch.no_grad()
def test_vmap(weight: nms.NMTensor) -> None:
    x = torch.randn(2, 3, 32)
    y = torch.vmap(lambda rows: F.linear(rows, weight))(x)
    torch.testing.assert_close(y, x @ weight.to_dense().T)


@needs_panels
@torch.no_grad()
def test_fake_inputs(weight: nms.NMTensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = F.linear(mode.from_tensor(torch.randn(3, 32)), weight)
    assert y.shape == (3, 20)


@needs_panels
@torch.no_grad()
def test_bad_input_is_refused(weight: nms.NMTensor) -> None:
    with pytest.raises(RuntimeError, match="the last size of x must be k = 32"):
        F.linear(torch.randn(3, 31), weight)
    with pytest.raises(RuntimeError, match="dtype"):
        F.linear(torch.randn(3, 32).double(), weight)
