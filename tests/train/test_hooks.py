"""What happens around a step: gradients restored, closures, writes from outside, mishaps, memory."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from train.common import assert_satisfies, batch, loss_of, mlp, train

import nmsparse_ext as nms
from nmsparse_ext.train import Sparsifier

LAMBDA = 0.05


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


class TestGradients:
    @pytest.mark.parametrize("fused", [False, True])
    def test_are_the_same_objects_with_the_same_values_after_the_step(self, fused: bool) -> None:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=fused)
        Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
        loss_of(model, batch(0)).backward()
        before = [(p.grad, p.grad.clone(), p.data_ptr()) for p in model.parameters()]
        optimizer.step()
        for p, (grad, value, address) in zip(model.parameters(), before, strict=True):
            assert p.grad is grad
            assert torch.equal(grad, value)
            assert p.data_ptr() == address

    def test_a_second_step_on_the_same_gradient_adds_the_term_once_more_not_twice(self) -> None:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
        loss_of(model, batch(0)).backward()
        for _ in range(2):
            dense, pruned = sparsifier.dense_weight("0").clone(), ~sparsifier.masks["0"]
            optimizer.step()
            expected = dense - 0.5 * (model[0].weight.grad + (LAMBDA * dense).masked_fill(~pruned, 0))
            torch.testing.assert_close(sparsifier.dense_weight("0"), expected, rtol=1e-14, atol=1e-16)

    def test_may_be_missing(self) -> None:
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
        before = sparsifier.dense_weight("0").clone()
        optimizer.step()
        model[2](batch(0)[:, :8]).sum().backward()
        optimizer.step()
        assert torch.equal(sparsifier.dense_weight("0"), before)
        assert model[0].weight.grad is None
        assert sparsifier.sad()["0.weight"] == 0
        train(model, optimizer, 2)
        assert not torch.equal(sparsifier.dense_weight("0"), before)

    def test_in_another_layout_than_the_weight(self) -> None:
        model = nn.Conv2d(8, 4, 3).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        sparsifier = Sparsifier(model, optimizer, {"weight": "2:4"}, lambda_w=LAMBDA)
        dense = sparsifier.dense_weight("weight").clone()
        grad = torch.randn_like(dense).contiguous(memory_format=torch.channels_last)
        model.weight.grad = grad
        pulled = (LAMBDA * dense).masked_fill(sparsifier.masks["weight"], 0)
        optimizer.step()
        torch.testing.assert_close(sparsifier.dense_weight("weight"), dense - 0.5 * (grad + pulled))
        assert model.weight.grad is grad

    def test_of_sparse_layout_are_refused_by_name(self) -> None:
        model = nn.Sequential(nn.Embedding(8, 8, sparse=True), nn.Linear(8, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Sparsifier(model, optimizer, {"0": "2:4"})
        before = model[0].weight.detach().clone()
        model(torch.tensor([1])).sum().backward()
        with pytest.raises(RuntimeError, match=r"0.weight has a gradient of layout torch.sparse_coo"):
            optimizer.step()
        assert torch.equal(model[0].weight, before)


class TestClosure:
    @pytest.mark.parametrize("by_name", [False, True])
    def test_sees_the_sparse_weights(self, by_name: bool) -> None:
        model, twin = mlp(), mlp()
        optimizer, plain = sgd(model), sgd(twin)
        sparsifier, other = (
            Sparsifier(m, o, "2:4", lambda_w=LAMBDA) for m, o in ((model, optimizer), (twin, plain))
        )
        for step in range(4):

            def closure(step: int = step) -> Tensor:
                assert torch.is_grad_enabled()
                assert_satisfies(model, sparsifier.scheme)
                optimizer.zero_grad()
                loss = loss_of(model, batch(step))
                loss.backward()
                return loss

            loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
            assert loss.item() == train(twin, plain, 1, start=step)[0]
        assert torch.equal(sparsifier.dense_weight("0"), other.dense_weight("0"))
        assert sparsifier.history == other.history

    def test_that_is_evaluated_twice_is_refused(self) -> None:
        class Twice(torch.optim.SGD):
            def step(self, closure):
                super().step(closure)
                super().step(closure)

        model = mlp()
        optimizer = Twice(model.parameters(), lr=0.1)
        sparsifier = Sparsifier(model, optimizer, "2:4")

        def closure() -> Tensor:
            loss = loss_of(model, batch(0))
            loss.backward()
            return loss

        with pytest.raises(RuntimeError, match="Twice evaluates its closure several times"):
            optimizer.step(closure)
        assert_satisfies(model, sparsifier.scheme)

    def test_of_an_optimizer_whose_step_calls_that_of_its_base(self) -> None:
        """Both are hooked; the outer one's own changes to gradients and weights count."""

        class Centralized(torch.optim.SGD):
            def step(self, closure=None):
                with torch.enable_grad():
                    loss = None if closure is None else closure()
                for p in self.param_groups[0]["params"]:
                    p.grad.sub_(p.grad.mean())
                super().step()
                with torch.no_grad():
                    for p in self.param_groups[0]["params"]:
                        p.mul_(0.5)
                return loss

        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)  # makes sure that SGD.step is hooked
        model = mlp()
        optimizer = Centralized(model.parameters(), lr=0.5)
        sparsifier = Sparsifier(model, optimizer, "2:4", method="ste")
        dense = sparsifier.dense_weight("0").clone()
        loss_of(model, batch(0)).backward()
        grad = model[0].weight.grad.clone()
        optimizer.step()
        expected = 0.5 * (dense - 0.5 * (grad - grad.mean()))
        torch.testing.assert_close(sparsifier.dense_weight("0"), expected, rtol=1e-12, atol=1e-14)
        assert sparsifier.step == 1
        assert_satisfies(model, sparsifier.scheme)

        def closure() -> Tensor:
            assert_satisfies(model, sparsifier.scheme)
            optimizer.zero_grad()
            loss = loss_of(model, batch(1))
            loss.backward()
            return loss

        optimizer.step(closure)
        assert sparsifier.step == 2
        assert_satisfies(model, sparsifier.scheme)

    def test_that_is_not_evaluated_is_refused(self) -> None:
        class Never(torch.optim.SGD):
            def step(self, closure=None):
                return super().step()

        model = mlp()
        optimizer = Never(model.parameters(), lr=0.1)
        Sparsifier(model, optimizer, "2:4")
        with pytest.raises(RuntimeError, match="did not evaluate its closure"):
            optimizer.step(lambda: None)

    def test_that_fails_leaves_everything_as_it_was(self) -> None:
        model = mlp()
        optimizer = sgd(model)
        sparsifier = Sparsifier(model, optimizer, "2:4")
        before = model[0].weight.detach().clone()

        def closure() -> Tensor:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
        assert torch.equal(model[0].weight, before)
        assert sparsifier.step == 0
        train(model, optimizer, 1)
        assert sparsifier.step == 1

    def test_of_lbfgs_is_refused(self) -> None:
        model = mlp()
        with pytest.raises(ValueError, match="LBFGS evaluates its closure several times"):
            Sparsifier(model, torch.optim.LBFGS(model.parameters()), "2:4")


class TestWritesFromOutside:
    def make(self) -> tuple[nn.Sequential, torch.optim.SGD, Sparsifier]:
        model = mlp()
        optimizer = sgd(model)
        sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
        train(model, optimizer, 3)
        return model, optimizer, sparsifier

    def test_are_adopted_with_one_warning(self) -> None:
        model, optimizer, _ = self.make()
        state = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        model.load_state_dict(state)
        with pytest.warns(
            UserWarning, match=r"0.weight, 2.weight changed outside the optimizer's step"
        ) as caught:
            train(model, optimizer, 1)
        assert len(caught) == 1
        assert caught[0].filename.endswith("common.py")  # where optimizer.step() is called
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            nn.init.normal_(model[0].weight)
            train(model, optimizer, 1)

    @pytest.mark.parametrize("method", ["sr-ste", "ste", "static"])
    def test_replace_the_dense_weight_and_the_mask(self, method: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        sparsifier = Sparsifier(model, optimizer, "2:4", method=method)
        train(model, optimizer, 2)
        new = torch.randn_like(model[0].weight)
        with torch.no_grad():
            model[0].weight.copy_(new)
        with pytest.warns(UserWarning, match="changed outside"):
            dense = sparsifier.dense_weight("0")
        assert torch.equal(dense, new)
        assert torch.equal(sparsifier.masks["0"], nms.nm_mask(new, "2:4"))
        assert torch.equal(model[0].weight, nms.nm_prune(new, "2:4"))

    def test_touch_only_the_groups_that_were_written_to(self) -> None:
        model, _, sparsifier = self.make()
        before = sparsifier.dense_weight("0").clone()
        with torch.no_grad():
            model[0].weight[3, 5] += 1
            expected = before.clone()
            expected[3, 4:8] = model[0].weight[3, 4:8]
        with pytest.warns(UserWarning, match="changed outside"):
            assert torch.equal(sparsifier.dense_weight("0"), expected)

    def test_of_the_same_values_are_no_writes(self) -> None:
        """A DDP broadcast, a checkpoint of this very step, an average swapped in and out."""
        model, optimizer, sparsifier = self.make()
        dense, masks = sparsifier.dense_weight("0").clone(), sparsifier.masks["0"]
        saved = {name: p.clone() for name, p in model.state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.load_state_dict({name: torch.zeros_like(p) for name, p in saved.items()})
            model.load_state_dict(saved)
            assert torch.equal(sparsifier.dense_weight("0"), dense)
            assert torch.equal(sparsifier.masks["0"], masks)
            train(model, optimizer, 1)

    def test_may_hold_nan(self) -> None:
        model, _, sparsifier = self.make()
        with torch.no_grad():
            model[0].weight[0, 0] = float("nan")
        with pytest.warns(UserWarning, match="changed outside"):
            assert sparsifier.dense_weight("0")[0, 0].isnan()
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")
            model[0].weight.copy_(model[0].weight.clone())
            assert sparsifier.masks["0"][0, 0]

    def test_by_way_of_new_storage(self) -> None:
        model, optimizer, sparsifier = self.make()
        new = torch.randn(8, 16, dtype=torch.float64)
        model[0].weight.data = new
        with pytest.warns(UserWarning, match="changed outside"):
            train(model, optimizer, 1)
        assert model[0].weight.data_ptr() == new.data_ptr()
        assert_satisfies(model, sparsifier.scheme)

    def test_of_another_shape_are_refused(self) -> None:
        model, optimizer, _ = self.make()
        model[0].weight.data = torch.randn(4, 16, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"0.weight has changed its shape from \[8, 16\] to \[4, 16\]"):
            optimizer.step()


def test_follows_the_model_to_another_dtype() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparsifier = Sparsifier(model, optimizer, "2:4")
    train(model, optimizer, 2)
    masks = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    model.float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sparsifier.dense_weight("0").dtype == torch.float32
        assert all(torch.equal(masks[name], sparsifier.masks[name]) for name in masks)
        train(model, optimizer, 2, dtype=torch.float32)
    assert_satisfies(model, sparsifier.scheme)


def test_late_parameter_groups() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model[0].parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
    assert_satisfies(model, sparsifier.scheme)
    train(model, optimizer, 2)
    frozen = sparsifier.dense_weight("2").clone()
    train(model, optimizer, 1)
    assert torch.equal(sparsifier.dense_weight("2"), frozen)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.2})
    train(model, optimizer, 2)
    assert not torch.equal(sparsifier.dense_weight("2"), frozen)
    assert_satisfies(model, sparsifier.scheme)
    assert optimizer.state[model[2].weight]["nm_dense"] is sparsifier.dense_weight("2")


def test_frozen_parameters_stay() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, "2:4")
    before = model[0].weight.clone()
    train(model, optimizer, 3)
    assert torch.equal(model[0].weight, before)
    assert_satisfies(model, sparsifier.scheme)


def test_a_failing_optimizer_does_not_leave_dense_weights_behind() -> None:
    class Fails(torch.optim.SGD):
        fail = False

        def step(self, closure=None):
            if self.fail:
                raise ZeroDivisionError
            return super().step(closure)

    model = mlp()
    optimizer = Fails(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
    train(model, optimizer, 1)
    sparse, dense = model[0].weight.detach().clone(), sparsifier.dense_weight("0").clone()
    optimizer.fail = True
    grad = model[0].weight.grad
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    # Nobody tells the hooks; whoever asks the Sparsifier, or steps again, finds all in order.
    assert sparsifier.step == 1
    assert torch.equal(sparsifier.dense_weight("0"), dense)
    assert torch.equal(model[0].weight, sparse)
    assert model[0].weight.grad is grad
    optimizer.fail = False
    train(model, optimizer, 1)
    assert sparsifier.step == 2


def test_a_failing_rule_leaves_everything_as_it_was() -> None:
    class Fails(nms.train.Rule):
        def adjust_grad(self, weight, grad, step):
            raise ZeroDivisionError

    model = mlp()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4", method=Fails())
    before = model[2].weight.detach().clone()
    loss_of(model, batch(0)).backward()
    grads = [p.grad for p in model.parameters()]
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert torch.equal(model[2].weight, before)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert_satisfies(model, sparsifier.scheme)


def test_the_names_and_tensors_of_the_model_stay() -> None:
    model = mlp()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    optimizer = sgd(model)
    Sparsifier(model, optimizer, "2:4")
    train(model, optimizer, 2)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert not list(model.buffers())
    assert type(model[0]) is nn.Linear


def test_finalize_leaves_a_plain_model_and_optimizer() -> None:
    model = mlp()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4")
    train(model, optimizer, 3)
    weight = model[0].weight.detach().clone()
    history = sparsifier.history
    assert sparsifier.finalize() is model
    assert torch.equal(model[0].weight, weight)
    assert_satisfies(model, sparsifier.scheme)
    assert not any(key.startswith("nm_") for state in optimizer.state.values() for key in state)
    assert not any(key.startswith("nm_") for group in optimizer.param_groups for key in group)
    assert "nm_step" not in str(optimizer.state_dict())
    train(model, optimizer, 1)
    assert nms.find_violation(model[0].weight.detach(), "2:4") is not None
    assert sparsifier.finalize() is model  # once more is once too many, but does no harm
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = model[0].weight.detach().clone()
        assert sparsifier.history == history
        assert sparsifier.sad() == {name: history[name][-1] for name in history.counts}
        assert sparsifier.masks["0"].sum() == 64
        assert torch.equal(model[0].weight, before)
    Sparsifier(model, optimizer, "1:4")
    assert_satisfies(model, {"0.weight": "1:4"})


def test_a_write_before_a_skipped_step_is_not_lost() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=True)
    sparsifier = Sparsifier(model, optimizer, "2:4")
    scaler = torch.amp.GradScaler("cpu")
    new = torch.randn_like(model[0].weight)
    with torch.no_grad():
        model[0].weight.copy_(new)
    scaler.scale(loss_of(model, batch(0) * float("inf"))).backward()
    with pytest.warns(UserWarning, match="changed outside"):
        scaler.step(optimizer)
    assert sparsifier.step == 0
    assert torch.equal(sparsifier.dense_weight("0"), new)


def test_an_optimizer_that_comes_wrapped() -> None:
    """As accelerate wraps it: an optimizer by type, but without hooks of its own."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    model = mlp()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, Wrapper(optimizer), "2:4")
    assert sparsifier.optimizer is optimizer
    train(model, optimizer, 1)
    assert sparsifier.step == 1


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_and_recurrent_weights(batch_first: bool) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=batch_first)
            self.lstm = nn.LSTM(16, 8, bidirectional=True, batch_first=batch_first)
            self.up = nn.ConvTranspose1d(16, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.lstm(self.attention(x, x, x)[0])[0].movedim(-1, 1)).sum()

    model = Both()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    sparsifier = Sparsifier(model, optimizer, "2:4")
    assert {"attention.in_proj_weight", "lstm.weight_hh_l0_reverse", "up.weight"} <= set(sparsifier.masks)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(3, 5, 16)).backward()
        optimizer.step()
        for name in sparsifier.masks:
            dim = 0 if name == "up.weight" else 1
            assert nms.find_violation(model.get_parameter(name).detach(), "2:4", dim=dim) is None


def test_needs_no_reference_to_itself() -> None:
    """The optimizer keeps it alive."""
    model = mlp()
    optimizer = sgd(model)
    Sparsifier(model, optimizer, "2:4")
    gc.collect()
    train(model, optimizer, 1)
    assert_satisfies(model, {"0.weight": "2:4", "2.weight": "2:4"})


class _LargestAllocation(TorchDispatchMode):
    """Notes the largest tensor that any op makes storage for, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("method", ["sr-ste", "ste", "static"])
@pytest.mark.parametrize("penalty", ["gradient", "decoupled"])
def test_hooks_allocate_no_tensors_after_the_first_step(method: str, penalty: str) -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, foreach=False)
    sparsifier = Sparsifier(model, optimizer, "2:4", method=method, penalty=penalty)

    def backward() -> None:
        optimizer.zero_grad()
        model(torch.ones(4, 64)).sum().backward()

    backward()
    optimizer.step()
    backward()
    with _LargestAllocation() as hooks:
        sparsifier._stepper.before_step(optimizer, (optimizer,), {})
        sparsifier._stepper.after_step(optimizer, (optimizer,), {})
    assert hooks.largest == 0


def test_one_gradient_buffer_of_extra_memory_is_not_needed() -> None:
    """What a sparse weight costs: the dense weight, a mask of one bit a weight, and those remembered."""
    model = nn.Linear(64, 128)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sparsifier = Sparsifier(model, optimizer, {"weight": "2:4"})
    model(torch.ones(4, 64)).sum().backward()
    optimizer.step()
    weight = sparsifier._weights["weight"]
    tensors = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for t in vars(weight).values()
        if isinstance(t, Tensor)
    }
    own = model.weight.untyped_storage()
    assert tensors.pop(own._cdata) == own.nbytes()
    assert sum(tensors.values()) == own.nbytes() + model.weight.numel() // 8
