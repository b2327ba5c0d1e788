"""fold_batch_norm: the same outputs from fewer layers, and nothing folded that has another use."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nmsparse_ext as nms

C = 8


def settled(model: nn.Module) -> nn.Module:
    """Norms with statistics and parameters that do something."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


class Net(nn.Module):
    """A convolution, a norm and a linear layer, joined as a test wants it."""

    def __init__(self, join: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.other = nn.Conv2d(C, C, 1)
        self.norm = nn.BatchNorm2d(C)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, x)


FOLDS = {
    "plain": lambda net, x: net.norm(net.conv(x)),
    "asks for the shape": lambda net, x: net.norm(y) if (y := net.conv(x)).shape[1] == C else y,
    "residual": lambda net, x: torch.relu(net.norm(net.conv(x)) + x),
    "twice": lambda net, x: net.norm(net.conv(net.norm(net.conv(x)))),
}
STAYS = {
    "used beside": lambda net, x: net.norm(y := net.conv(x)) + y,
    "two convolutions": lambda net, x: net.norm(net.conv(x)) + net.norm(net.other(x)),
    "something between": lambda net, x: net.norm(net.conv(x) * 2),
    "without a convolution": lambda net, x: net.norm(x),
    "once with and once without": lambda net, x: net.norm(net.conv(x)) + net.conv(x * 2),
    "returned too": lambda net, x: (net.norm(y := net.conv(x)), y)[0:2],
    "changed afterwards": lambda net, x: (net.norm(y := net.conv(x)), y.add_(1))[0],
}


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("join", FOLDS.values(), ids=FOLDS)
def test_folds(join: Callable[[nn.Module, Tensor], Tensor]) -> None:
    net, x = settled(Net(join)), torch.randn(2, C, 5, 5)
    nms.nm_prune_(net.conv.weight.data, "2:4")
    expected = net(x)
    assert nms.fold_batch_norm(net, x) == ["norm"]
    assert isinstance(net.norm, nn.Identity)
    assert nms.find_violation(net.conv.weight, "2:4") is None
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)
    nms.convert(net, {"conv": "2:4"}, policy="always")
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("join", STAYS.values(), ids=STAYS)
def test_stays(join: Callable[[nn.Module, Tensor], Tensor]) -> None:
    net, x = settled(Net(join)), torch.randn(2, C, 5, 5)
    before, expected = copy.deepcopy(net.state_dict()), first(net(x))
    assert nms.fold_batch_norm(net, x) == []
    assert isinstance(net.norm, nn.BatchNorm2d)
    assert torch.equal(first(net(x)), expected)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not net.conv._forward_hooks
    assert not net.norm._forward_pre_hooks


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("affine", [True, False])
def test_kinds(dims: int, groups: int, affine: bool) -> None:
    conv, norm = (
        (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1],
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1],
    )
    net = settled(nn.Sequential(conv(C, C, 3, groups=groups), norm(C, affine=affine), nn.ReLU()))
    x = torch.randn(2, C, *(5,) * dims)
    expected = net(x)
    assert nms.fold_batch_norm(net, (x,)) == ["1"]
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)


def test_stays_for_other_reasons() -> None:
    x = torch.randn(2, C, 5, 5)
    no_statistics = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C, track_running_stats=False)).eval()
    hooked = settled(nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)))
    hooked[0].register_forward_hook(lambda module, args, output: None)
    tied = settled(nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.Conv2d(C, C, 1)))
    tied[2].weight = tied[0].weight
    was_packed = settled(nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)))
    nms.nm_prune_(was_packed[0].weight.data, "2:4")
    nms.convert(was_packed, "2:4", policy="always")
    for net in (no_statistics, hooked, tied, was_packed):
        assert nms.fold_batch_norm(net, {"input": x}) == []


def test_layout_dtype_and_mode() -> None:
    """channels_last and bfloat16 stay; a model in training mode is folded as it is in eval mode."""
    net = settled(nn.Sequential(nn.Conv2d(C, C, 3, bias=False), nn.BatchNorm2d(C)))
    net = net.to(torch.bfloat16, memory_format=torch.channels_last)
    x = torch.randn(2, C, 5, 5, dtype=torch.bfloat16)
    expected = net(x)
    net.train()
    assert nms.fold_batch_norm(net, x) == ["1"]
    assert net.training
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert net[0].weight.dtype == net[0].bias.dtype == torch.bfloat16
    torch.testing.assert_close(net(x), expected, atol=0.05, rtol=0.05)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        nms.fold_batch_norm(3, torch.ones(1))
    with pytest.raises(TypeError, match="example_input must be a Tensor"):
        nms.fold_batch_norm(nn.Conv2d(1, 1, 1), 3)
