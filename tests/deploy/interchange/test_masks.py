"""Formats that keep a dense weight and a mask: torch.ao.pruning, ModelOpt, apex ASP."""

from __future__ import annotations

from pathlib import Path

import modelopt.torch.opt as mto
import modelopt.torch.sparsity as mts
import pytest
import torch
from torch import Tensor, nn
from torch.ao.pruning import WeightNormSparsifier

import nmsparse_ext as nms
from nmsparse_ext.deploy import detect_format, from_peer, to_peer
from nmsparse_ext.tensor import NMTensor


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 6))


def loaded(tensors: dict[str, Tensor], path: Path) -> nn.Module:
    nms.save_file(tensors, path)
    return nms.load_into(small().eval(), path)


# ----------------------------------------------------------------------------------------- torch.ao.pruning


def prepared(model: nn.Module, zeros: int = 2) -> WeightNormSparsifier:
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=zeros)
    sparsifier.prepare(model, [{"tensor_fqn": f"{name}.weight"} for name in ("2", "3")])
    return sparsifier


@pytest.mark.parametrize(("zeros", "pattern"), [(2, "2:4"), (3, "1:4")])
def test_reading_torch_pruning(tmp_path: Path, zeros: int, pattern: str) -> None:
    model = small()
    sparsifier = prepared(model, zeros)
    sparsifier.step()
    saved = {"model": model.state_dict(), "sparsifier": sparsifier.state_dict()}
    assert detect_format(saved) == "torch-pruning"
    saved["sparsifier"]["state"] = dict(saved["sparsifier"]["state"])  # weights_only knows no defaultdict
    torch.save(saved, tmp_path / "m.pt")
    assert detect_format(tmp_path / "m.pt") == "torch-pruning"
    tensors = from_peer(tmp_path / "m.pt")
    live = from_peer(model)
    for name in ("2.weight", "3.weight"):
        assert torch.equal(live[name].to_dense(), tensors[name].to_dense())
    with pytest.raises(nms.FormatError, match=r"no mask: state dicts do not have it.*squash_mask"):
        from_peer(model.state_dict())
    assert str(tensors["2.weight"].pattern) == str(tensors["3.weight"].pattern) == pattern
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(loaded(tensors, tmp_path / "ours.safetensors")(x), model(x))


def test_torch_pruning_reads_what_we_write(tmp_path: Path) -> None:
    model = small()
    for layer in (model[2], model[3]):
        nms.nm_prune_(layer.weight.data, "2:4")
    to_peer(from_peer(model), tmp_path / "m.pt", format="torch-pruning")
    theirs = small()
    sparsifier = prepared(theirs)
    theirs.load_state_dict(torch.load(tmp_path / "m.pt"))
    assert torch.equal(theirs[2].parametrizations.weight[0].mask, (model[2].weight != 0).float())
    sparsifier.squash_mask()
    assert torch.equal(theirs[2].weight, model[2].weight)
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(theirs(x), model(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.parametrizations.weight.original": None}, "there is a mask of 'a.weight', but no original"),
        ({"a.parametrizations.weight.0.mask": None}, "has an original, but no mask"),
        ({"a.weight": torch.zeros(2, 4)}, "has an original, but is there too"),
        ({"a.parametrizations.weight.0.mask": torch.zeros(4, 2)}, "the mask has shape"),
        ({"a.parametrizations.weight.1.base": torch.zeros(4)}, "of a parametrization that is no mask"),
        ({"a.parametrizations.weight.1.mask": torch.zeros(4)}, "masks of shapes"),
    ],
)
def test_torch_pruning_that_does_not_fit(change: dict[str, Tensor | None], message: str) -> None:
    state = {
        "a.parametrizations.weight.original": torch.ones(2, 4),
        "a.parametrizations.weight.0.mask": torch.ones(2, 4),
    }
    state = {name: t for name, t in (state | change).items() if t is not None}
    with pytest.raises(nms.FormatError, match=message):
        from_peer(state, format="torch-pruning")


# ----------------------------------------------------------------------------------------------- ModelOpt


def test_reading_modelopt(tmp_path: Path) -> None:
    model = mts.sparsify(small(), "sparse_magnitude", {"verbose": False}).eval()
    mto.save(model, tmp_path / "m.pth")
    assert detect_format(tmp_path / "m.pth") == "modelopt"
    tensors = from_peer(tmp_path / "m.pth")
    # It prunes where outputs are a multiple of 8 and inputs of 16; what it stores under the mask is no zero.
    packed = {name: str(t.pattern) for name, t in tensors.items() if isinstance(t, NMTensor)}
    assert packed == {"0.weight": "2:4", "2.weight": "2:4"}
    assert bool(
        torch.load(tmp_path / "m.pth", weights_only=False)["model_state_dict"]["2.weight"].ne(0).all()
    )
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(loaded(tensors, tmp_path / "ours.safetensors")(x), model(x))
    exported = mts.export(model)
    assert detect_format(exported) == "dense"
    assert torch.equal(from_peer(exported)["2.weight"].to_dense(), tensors["2.weight"].to_dense())


def test_modelopt_restores_what_we_write(tmp_path: Path) -> None:
    model = small().eval()
    for layer in (model[0], model[2]):
        nms.nm_prune_(layer.weight.data, "2:4")
    to_peer(from_peer(model), tmp_path / "m.pth", format="modelopt", model=model)
    theirs = mto.restore(small(), tmp_path / "m.pth").eval()
    assert torch.equal(theirs[2].weight, model[2].weight)
    assert theirs[2]._weight_mask.sum() == 16 * 16
    assert theirs[3]._weight_mask.all()
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(theirs(x), model(x))
    # And on: what it saves then is what we read.
    mto.save(theirs, tmp_path / "again.pth")
    assert str(from_peer(tmp_path / "again.pth")["0.weight"].pattern) == "2:4"


# ----------------------------------------------------------------------------------------------- apex ASP


def asp_state(pattern: str = "2:4", *, recompute: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    """What ``ASP.prune_trained_model`` leaves in a state dict: names and dtypes as apex documents them."""
    model = small()
    state = dict(model.state_dict())
    for name in ("0.weight", "2.weight"):
        mask = nms.nm_mask(state[name], pattern)
        module, parameter = name.split(".")
        if recompute:
            state[f"{module}.__{parameter}_mma_pruned_p"] = state[name] * ~mask
        state[f"{module}.__{parameter}_mma_mask"] = mask
    return model, state


@pytest.mark.parametrize("recompute", [False, True])
def test_reading_asp(recompute: bool) -> None:
    model, state = asp_state(recompute=recompute)
    assert detect_format({"model": state, "optimizer": {}}) == "apex-asp"
    tensors = from_peer({"model": state, "optimizer": {}})
    assert tensors.keys() == model.state_dict().keys()
    for name in ("0.weight", "2.weight"):
        assert isinstance(tensors[name], NMTensor)
        assert torch.equal(tensors[name].to_dense(), nms.nm_prune(model.get_parameter(name), "2:4"))


def test_masks_that_are_not_computed_yet_prune_nothing() -> None:
    _, state = asp_state()
    for name in state:
        if "mma_mask" in name:
            state[name] = torch.ones_like(state[name])
    tensors = from_peer(state)
    assert not any(isinstance(tensor, NMTensor) for tensor in tensors.values())


def test_a_mask_says_what_is_kept_even_where_it_is_zero() -> None:
    w = torch.tensor([[0.0, 5, 0, 0, -0.0, 0, 0, 1]])
    mask = torch.tensor([[1, 1, 0, 0, 1, 0, 0, 1]]).bool()
    weight = from_peer({"w": w, "__w_mma_mask": mask})["w"]
    assert str(weight.pattern) == "2:4"
    assert weight.values.tolist() == [[0, 5, 0, 1]]
    assert weight.values.signbit().tolist() == [[False, False, True, False]]
    again = to_peer({"w": weight}, format="apex-asp")
    assert torch.equal(again["__w_mma_mask"], mask)
    assert torch.equal(again["w"].signbit(), w.signbit())


def test_writing_asp() -> None:
    _, state = asp_state()
    written = to_peer(from_peer(state), format="apex-asp")
    assert written.keys() == state.keys()
    for name, tensor in state.items():
        mask = (
            state.get(name.replace(".weight", ".__weight_mma_mask"), tensor) if "mma" not in name else tensor
        )
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor if mask is tensor else tensor * mask)


def test_masks_without_a_pattern_leave_zeros() -> None:
    w = torch.randn(4, 8)
    mask = torch.rand(4, 8) < 0.7
    mask[0, :4] = True
    tensors = from_peer({"w": w, "__w_mma_mask": mask})
    assert torch.equal(tensors["w"], w * mask)
    with pytest.raises(ValueError, match=r"mask of w: w does not satisfy 2:4.*starts at \[0, 0\] has 4"):
        from_peer({"w": w, "__w_mma_mask": mask}, pattern="2:4", counts="kept")
    with pytest.raises(nms.FormatError, match="there is a mask of 'v', but no such weight"):
        from_peer({"w": w, "__v_mma_mask": mask})
