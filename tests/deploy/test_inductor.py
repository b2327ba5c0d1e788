"""inductor_options: packed layers do what follows them, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import nmsparse_ext as nms
from nmsparse_ext.deploy.inductor import FuseEpilogues, inductor_options

WIDTH = 32


class Net(nn.Module):
    """Activations that can be fused, and results that are used in another way too."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(*(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2)))
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.convs[0](x))
        x = F.relu(self.convs[1](x) + x).flatten(2).mT
        x = F.gelu(self.linears[0](x))
        x = F.silu(self.linears[1](x))
        x = F.relu(self.linears[2](x))
        y = self.linears[3](x)
        return self.linears[4](F.gelu(y)) + y  # not fused: y is used twice


class Noting(FuseEpilogues):
    """Notes which activations the layers have afterwards."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def __call__(self, graph: fx.Graph) -> None:
        super().__call__(graph)
        graph.lint()
        self.found += [str(node.args[-1]) for node in graph.nodes if "panel_" in str(node.target)]


@pytest.mark.skipif(nms.build_info().reference, reason="without the extension nothing is packed in panels")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fuses(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    net = Net().eval()
    for name in (scheme := nms.Scheme.uniform(net, "2:4")):
        nms.nm_prune_(net.get_parameter(name).data, "2:4")
    nms.convert(net.to(dtype), scheme, policy="always")
    x = torch.randn(2, WIDTH, 5, 5, dtype=dtype).to(memory_format=memory_format)
    fuse = Noting()
    options = inductor_options() | {"post_grad_custom_pre_pass": fuse, "fx_graph_cache": False}
    with torch.no_grad():
        actual = torch.compile(copy.deepcopy(net), options=options, fullgraph=True)(x)
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(actual, net(x), atol=tolerance, rtol=tolerance)
    # Elsewhere the sum is taken of images that were copied into another layout first.
    second = "relu" if memory_format == torch.channels_last else "none"
    assert fuse.found == ["relu", second, "gelu", "silu", "relu", "none", "none"]


def graph_of(activation: str, *, keep: bool = False) -> fx.Graph:
    """A packed linear layer and what a pass sees behind it."""
    graph = fx.Graph()
    x, values, indices = (graph.placeholder(name) for name in ("x", "values", "indices"))
    op = torch.ops.nmsparse.panel_linear.default
    layer = graph.call_function(op, (x, values, indices, None, 2, 4, 8, 8, activation))
    end = graph.call_function(torch.ops.aten.relu.default, (layer,))
    graph.output((end, layer) if keep else (end,))
    return graph


def test_what_stays() -> None:
    for graph in (graph_of("none", keep=True), graph_of("gelu")):
        before = str(graph)
        FuseEpilogues()(graph)
        assert str(graph) == before


def residual_graph(**other: object) -> fx.Graph:
    """A packed convolution of an image in channels_last, and what is added to its result."""
    graph = fx.Graph()
    names = ("x", "values", "indices", "other")
    x, values, indices, more = (graph.placeholder(name) for name in names)
    more.meta["val"] = torch.empty(2, 8, 5, 5).to(memory_format=torch.channels_last)
    if "like" in other:
        more.meta["val"] = other["like"]
    geometry = ([1, 1], [1, 1], [0, 0, 0, 0], [1, 1], 1)
    op = torch.ops.nmsparse.panel_conv.default
    layer = graph.call_function(op, (x, values, indices, None, None, 2, 4, 8, 8, *geometry, "none"))
    layer.meta["val"] = torch.empty(2, 5, 5, 8)
    moved = graph.call_function(torch.ops.aten.permute.default, (layer, [0, 3, 1, 2]))
    moved.meta["val"] = layer.meta["val"].permute(0, 3, 1, 2)
    operands = (more, moved) if other.get("turned") else (moved, more)
    kwargs = {"alpha": 2} if other.get("alpha") else {}
    total = graph.call_function(torch.ops.aten.add.Tensor, operands, kwargs)
    end = graph.call_function(torch.ops.aten.relu.default, (total,))
    graph.output((end, moved) if other.get("keep") else (end,))
    return graph


@pytest.mark.parametrize("turned", [False, True])
def test_residual(turned: bool) -> None:
    graph = residual_graph(turned=turned)
    FuseEpilogues()(graph)
    graph.lint()
    back, layer, moved = (node for node in graph.nodes if node.op == "call_function")
    assert back.args[1] == [0, 2, 3, 1]
    assert (layer.args[4], layer.args[-1]) == (back, "relu")
    assert moved.args == (layer, [0, 3, 1, 2])


@pytest.mark.parametrize(
    "other",
    [
        {"keep": True},  # the result is used without what is added
        {"alpha": True},
        {"like": torch.empty(2, 8, 5, 5)},  # of another layout
        {"like": torch.empty(2, 8, 1, 1)},  # broadcast
        {"like": torch.empty(2, 8, 5, 5, dtype=torch.float64).to(memory_format=torch.channels_last)},
        {"like": None},
    ],
)
def test_what_is_no_residual(other: dict[str, object]) -> None:
    graph = residual_graph(**other)
    before = str(graph)
    FuseEpilogues()(graph)
    assert str(graph) == before


def test_relu() -> None:
    graph = graph_of("none")
    FuseEpilogues()(graph)
    assert [node.args[-1] for node in graph.nodes if node.op == "call_function"] == ["relu"]
    assert FuseEpilogues().uuid() == FuseEpilogues().uuid()
