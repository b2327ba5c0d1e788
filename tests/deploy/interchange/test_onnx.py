"""ONNX: the zeros are in the file, onnxruntime computes the same, and the model is as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import nmsparse_ext as nms
from nmsparse_ext.deploy import export_onnx, from_peer, to_peer
from nmsparse_ext.deploy.interchange.onnx import sparse_weights
from nmsparse_ext.tensor import NMTensor


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 8, 3)
        self.split = nn.Conv2d(8, 8, 1, groups=2)
        self.fc = nn.Linear(8, 12)
        self.head = nn.Linear(12, 8, bias=False)
        self.tied = nn.Linear(12, 8)
        self.tied.weight = self.head.weight
        for layer in (self.conv, self.fc, self.head, self.split):
            nms.nm_prune_(layer.weight.data, "2:4")

    def forward(self, x: Tensor) -> Tensor:
        h = self.split(self.conv(self.stem(x)).relu()).mean((2, 3))
        h = self.fc(h)
        return self.head(h) + self.tied(h)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, list, Tensor]:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("onnx") / "m.onnx"
    model = nms.convert(Net().eval(), policy="always")
    x = torch.randn(2, 3, 8, 8)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    report = export_onnx(model, x, path)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert isinstance(model.fc.weight, NMTensor)
    return model, path, report, x


def test_onnxruntime_computes_the_same(exported: tuple) -> None:
    model, path, _, x = exported
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_the_zeros_are_there(exported: tuple) -> None:
    model, path, report, _ = exported
    by_name = {weight.name: weight for weight in report}
    assert by_name["conv.weight"].is_24
    assert by_name["conv.weight"].why_not is None
    assert by_name["fc.weight"].is_24
    assert by_name["fc.weight"].axis == 1
    assert not by_name["stem.weight"].is_24
    assert by_name["stem.weight"].why_not == "3 inputs are no multiple of 4"
    assert by_name["split.weight"].why_not == "a convolution in 2 groups has no sparse kernels"
    assert sparse_weights(onnx.load(str(path))) == report
    tensors = from_peer(path)
    for name in ("conv.weight", "fc.weight"):
        assert torch.equal(tensors[name].to_dense(), model.get_parameter(name).to_dense())


def test_training_flags_stay(tmp_path: Path) -> None:
    """Each module's own: batch norms that somebody has frozen stay so."""
    model = Net().train()
    model.stem.eval()
    before = {name: module.training for name, module in model.named_modules()}
    export_onnx(model, torch.randn(2, 3, 8, 8), tmp_path / "m.onnx")
    assert {name: module.training for name, module in model.named_modules()} == before


def test_products_the_other_way_round(tmp_path: Path) -> None:
    """MatMul has its inputs in front; what is transposed on the way counts as the weight itself."""
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    w = nms.nm_prune(torch.randn(8, 6), "2:4", dim=0).numpy()
    nodes = [
        helper.make_node("MatMul", ["x", "front"], ["a"]),
        helper.make_node("Transpose", ["last"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["b"]),
        helper.make_node("Gemm", ["x", "last"], ["c"], transB=1),
        helper.make_node("Gemm", ["x", "dense"], ["d"]),
    ]
    weights = {"front": w, "last": np.ascontiguousarray(w.T), "dense": np.ones((8, 2), np.float32)}
    names = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in "xabcd"]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", names[:1], names[1:], initializers)
    proto = helper.make_model(graph)
    found = {
        weight.name: (weight.op, weight.axis, weight.is_24, weight.why_not)
        for weight in sparse_weights(proto)
    }
    assert found == {
        "front": ("MatMul", 0, True, None),
        "last": ("MatMul", 1, True, None),
        "dense": ("Gemm", 0, False, "it is not 2:4 along its inputs"),
    }
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    tensors = from_peer(tmp_path / "m.onnx")
    assert (tensors["front"].group_dim, tensors["last"].group_dim) == (0, 1)
    (tmp_path / "bad.onnx").write_bytes(proto.SerializeToString()[:-40] + b"\xff" * 40)
    with pytest.raises(nms.FormatError, match="no valid ONNX model"):
        from_peer(tmp_path / "bad.onnx")


def test_tensors_take_the_place_of_the_models(tmp_path: Path) -> None:
    trained, fresh = (
        nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)),
        nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)),
    )
    nms.nm_prune_(trained[0].weight.data, "2:4")
    trained[1].running_mean.fill_(3)
    own = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    x = torch.randn(2, 8)
    to_peer(from_peer(trained), tmp_path / "m.onnx", format="onnx", model=fresh, example_input=x)
    assert all(torch.equal(tensor, own[name]) for name, tensor in fresh.state_dict().items())
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, trained.eval()(x).detach().numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"model has 0\.weight, but the tensors do not"):
        to_peer({}, tmp_path / "m.onnx", format="onnx", model=fresh, example_input=x)
    with pytest.raises(ValueError, match=r"0\.weight has shape \[4, 8\] in the model"):
        to_peer({"0.weight": x}, tmp_path / "m.onnx", format="onnx", model=fresh, example_input=x)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        export_onnx({}, torch.zeros(1), tmp_path / "m.onnx")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="example_input must be"):
        export_onnx(nn.Linear(4, 4), 3, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
