"""What else happens to a parameter: distributed wrappers, functional transforms, parametrizations."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import nmsparse_ext as nms
from nmsparse_ext import deploy
from nmsparse_ext.tensor import NMTensor


def pair(**options: object) -> tuple[nn.Sequential, nn.Sequential]:
    """A pruned network, dense and packed."""
    dense = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16))
    for layer in (dense[0], dense[2]):
        nms.nm_prune_(layer.weight.data, "2:4")
    return dense, nms.convert(copy.deepcopy(dense), policy="always", **options)


# ------------------------------------------------------------------------------------------------ distributed


def train_with_ddp(rank: int, folder: str) -> None:
    """Two ranks train what is not packed, on different data, and must stay equal."""
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    try:
        dense, packed = pair()
        for model in (dense, packed):
            dense_weights = (model[0].weight, model[2].weight)
            for weight in dense_weights:
                weight.requires_grad_(False)
            wrapped = nn.parallel.DistributedDataParallel(model)
            optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
            for step in range(2):
                x = torch.randn(4, 32, generator=torch.Generator().manual_seed(10 * step + rank))
                wrapped(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        for a, b in zip((dense[0].bias, dense[2].bias), (packed[0].bias, packed[2].bias), strict=True):
            torch.testing.assert_close(a, b)
        torch.save([packed[0].bias, packed[2].bias], f"{folder}/{rank}.pt")
        from torch.distributed.fsdp import fully_shard

        sharded = fully_shard(pair()[0])
        with pytest.raises(ValueError, match=r"0\.weight is a DTensor"):
            nms.convert(sharded, policy="always")
        with pytest.raises(NotImplementedError, match=r"fully_shard: packed weights cannot be sharded"):
            fully_shard(pair()[1])
        dense, packed = pair()
        whole = {p for p in packed.parameters() if isinstance(p, nms.NMTensor)}
        sharded = fully_shard(packed, ignored_params=whole)
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(rank))
        torch.testing.assert_close(sharded(x), dense(x))
    finally:
        torch.distributed.destroy_process_group()


def test_ddp(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_with_ddp, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_ddp_ignores_packed_weights_only() -> None:
    model = pair()[1]
    assert model._ddp_params_and_buffers_to_ignore == ["0.weight", "2.weight"]
    whole = nn.ModuleDict({"body": model, "head": nn.Linear(16, 4)})
    deploy.ignore_in_ddp(whole)
    deploy.ignore_in_ddp(whole)
    assert whole._ddp_params_and_buffers_to_ignore == ["body.0.weight", "body.2.weight"]
    dense = nn.Linear(4, 4)
    deploy.ignore_in_ddp(dense)
    assert not hasattr(dense, "_ddp_params_and_buffers_to_ignore")


# ------------------------------------------------------------------------------------- functional transforms


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations(activation: str, dtype: torch.dtype) -> None:
    w = nms.nm_prune(torch.randn(24, 32), "2:4").to(dtype)
    x, bias = torch.randn(5, 32).to(dtype).requires_grad_(), torch.randn(24).to(dtype).requires_grad_()
    expected = F.linear(x.float(), w.float(), bias.float())
    expected = (expected if activation == "none" else getattr(F, activation)(expected)).to(dtype)
    wanted = torch.autograd.grad(expected.float().sin().sum(), (x, bias))
    for weight in (w, nms.compress(w, "2:4"), nms.compress(w, "2:4").with_engine("decompress")):
        y = nms.linear(x, weight, bias, activation=activation)
        torch.testing.assert_close(y, expected, atol=2e-2, rtol=2e-2)
        found = torch.autograd.grad(y.float().sin().sum(), (x, bias))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=0.25 if dtype == torch.bfloat16 else 1e-4, rtol=2e-2)
        with torch.autocast("cpu", torch.bfloat16):
            low = nms.linear(x, weight, bias, activation)
            assert low.dtype == torch.bfloat16
            torch.testing.assert_close(low.float(), expected.float(), atol=0.1, rtol=5e-2)
    with pytest.raises(ValueError, match="activation must be one of"):
        nms.linear(x, w, bias, activation="tanh")  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("batch", [(), (5,), (2, 5), (1, 2, 5)])
def test_bias_of_every_shape(batch: tuple[int, ...], activation: str) -> None:
    w, x = nms.nm_prune(torch.randn(24, 32), "2:4"), torch.randn(*batch, 32)
    weight = nms.compress(w, "2:4")
    shapes = [(24,), (1,), (), (*batch, 24), (*(1 for _ in batch), 24), (*batch, 1)]
    for shape in shapes:
        bias = torch.randn(shape, requires_grad=True)
        try:
            expected = F.linear(x, w, bias)
        except RuntimeError:
            continue  # F.linear takes fewer shapes for some inputs
        got = nms.linear(x, weight, bias, activation)
        expected = expected if activation == "none" else F.relu(expected)
        torch.testing.assert_close(got, expected, msg=lambda text, s=shape: f"{s}: {text}")
        torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), bias)[0] for y in (got, expected)))
    for shape in ((23,), (3, *batch, 24), (24, 1)):
        with pytest.raises(RuntimeError):
            F.linear(x, weight, torch.randn(shape))


def test_functional_call_and_grad() -> None:
    dense, packed = pair()
    x = torch.randn(5, 32)
    other = {name: value for name, value in pair()[1].named_parameters() if "weight" in name}
    biases = {name: value.detach() for name, value in packed.named_parameters() if "bias" in name}

    def loss(biases: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(packed, {**other, **biases}, (x,)).square().mean()

    unpacked = {name: value.to_dense() for name, value in other.items()}
    expected = torch.func.functional_call(dense, {**unpacked, **biases}, (x,)).square().mean()
    torch.testing.assert_close(loss(biases), expected)
    grads = torch.func.grad(loss)(biases)
    for name, value in biases.items():
        assert grads[name].shape == value.shape


def test_vmap() -> None:
    dense, packed = pair()
    x = torch.randn(3, 5, 32)
    for in_dim in (0, 1):
        torch.testing.assert_close(
            torch.vmap(packed, in_dims=in_dim)(x), torch.vmap(dense, in_dims=in_dim)(x)
        )
    jacobian = torch.func.jacrev(lambda x: packed(x))(x[0, 0])
    torch.testing.assert_close(jacobian, torch.func.jacrev(lambda x: dense(x))(x[0, 0]))


def test_forward_mode() -> None:
    dense, packed = pair()
    x, direction = torch.randn(5, 32), torch.randn(5, 32)
    found = torch.func.jvp(packed, (x,), (direction,))
    for a, b in zip(found, torch.func.jvp(dense, (x,), (direction,)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("keep", ["both", "engine"])
def test_meta_device(keep: str) -> None:
    packed = pair(keep=keep)[1].to("meta")
    assert isinstance(packed[0].weight, NMTensor)
    assert packed(torch.empty(5, 32, device="meta")).shape == (5, 16)
    with pytest.raises(NotImplementedError, match="share_memory_"):
        pair(keep=keep)[1].share_memory()


def test_parametrizations_are_refused_by_name() -> None:
    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    with pytest.raises(NotImplementedError, match=r"NMTensor does not support aten\.mul"):
        parametrize.register_parametrization(pair()[1][0], "weight", Double())
    for norm in (parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal):
        with pytest.raises((NotImplementedError, TypeError), match="NMTensor does not support"):
            norm(pair()[1][0])(torch.randn(2, 32))
    with pytest.raises(NotImplementedError, match="NMTensor does not support"):
        prune.l1_unstructured(pair()[1][0], "weight", 0.5)


# --------------------------------------------------------------------------------------------- convert(dtype)


@pytest.mark.parametrize("keep", ["both", "engine"])
def test_convert_for_autocast(keep: str) -> None:
    torch.compiler.reset()
    dense, packed = pair(dtype=torch.bfloat16, keep=keep)
    assert packed[0].weight.dtype == torch.bfloat16
    assert packed[0].bias.dtype == torch.float32
    x = torch.randn(5, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = dense(x)
        torch.testing.assert_close(packed(x), expected, atol=5e-2, rtol=5e-2)
        graphs: list[torch.fx.GraphModule] = []

        def keep_graph(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
            graphs.append(graph)
            return graph

        from torch._dynamo.backends.common import aot_autograd

        backend = aot_autograd(fw_compiler=keep_graph)
        torch.testing.assert_close(
            torch.compile(packed, fullgraph=True, backend=backend)(x), expected, atol=5e-2, rtol=5e-2
        )
    if packed[0].weight.engine == "cpu-panels":
        code = "".join(str(graph.graph) for graph in graphs)
        assert "panel_linear" in code
        assert "panel_pack" not in code
        assert "float32" not in code.split("panel_linear", 1)[1].split("\n")[0]
    measured = nms.convert(pair()[0], example_input=x, dtype=torch.bfloat16)
    assert all(row.dense_ms for row in deploy.report(measured))
    with pytest.raises(ValueError, match="dtype must be None or one of"):
        nms.convert(pair()[0], dtype=torch.int8)


def test_compiled_autocast_does_not_repack() -> None:
    if nms.compress(torch.randn(16, 16), "2:4", prune=True).engine != "cpu-panels":
        pytest.skip("panels are for the compiled extension")
    torch.compiler.reset()
    w, stack = nms.nm_prune(torch.randn(48, 32), "2:4"), nms.nm_prune(torch.randn(2, 48, 32), "2:4", dim=2)
    weight, experts = nms.compress(w, "2:4"), nms.compress(stack, "2:4", dim=2)
    graphs: list[torch.fx.GraphModule] = []

    def keep_graph(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    def products(x: Tensor, w: Tensor, e: Tensor) -> tuple[Tensor, ...]:
        bias = torch.zeros(48)
        return torch.addmm(bias, x, w.t()), torch.mm(x, w.t()), x @ w.T, F.linear(x, e[1]), x @ e[0].mT

    x = torch.randn(5, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(products, fullgraph=True, backend=aot_autograd(fw_compiler=keep_graph))
        for got, expected in zip(compiled(x, weight, experts), products(x, w, stack), strict=True):
            assert got.dtype == expected.dtype
            torch.testing.assert_close(got, expected, atol=0.2, rtol=5e-2)
    code = "".join(str(graph.graph) for graph in graphs)
    assert "panel_linear" in code
    for name in ("panel_pack", "panel_restore", "panel_unpack", "decompress"):
        assert name not in code
