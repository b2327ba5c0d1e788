"""Packed weights copied, moved, saved and loaded."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from packed_samples import ENGINES, Net, freeze, packed, packed_copy, pruned_net, sparse
from torch import nn

import nmsparse_ext as nms
from nmsparse_ext.tensor import NMTensor


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
