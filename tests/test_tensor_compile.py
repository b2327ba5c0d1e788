"""Packed weights in compiled and exported graphs, under autocast, without memory."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from packed_samples import ENGINES, freeze, packed, packed_copy, pruned_net, sparse
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import nmsparse_ext as nms
from nmsparse_ext.tensor import NMTensor


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


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_caches_of_compiled_code_know_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches on disk outlive an upgrade of this package: code that calls ops of other schemas is not used."""
    net, x = packed_copy(pruned_net()), torch.randn(2, 8, 6, 6)
    hits = []
    with fresh_cache(), torch.no_grad():
        for schemas in ("of old", "of old", "of today"):
            monkeypatch.setattr(nms.tensor, "schemas", lambda schemas=schemas: schemas)
            torch._dynamo.reset()
            counters.clear()
            torch.compile(net)(x)
            hits.append(counters["aot_autograd"]["autograd_cache_hit"])
    assert hits == [0, 1, 0]


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_caches_of_compiled_code_serve_packed_weights() -> None:
    net, x = packed_copy(pruned_net()), torch.randn(2, 8, 6, 6)
    hits = []
    with fresh_cache(), torch.no_grad():
        for _ in range(2):
            torch._dynamo.reset()
            counters.clear()
            torch.compile(net)(x)
            hits.append(counters["aot_autograd"]["autograd_cache_hit"])
    assert hits == [0, 1]


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
