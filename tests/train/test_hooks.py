"""What happens around a step: gradients restored, closures, writes from outside, mishaps, memory."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from train.common import assert_satisfies, batch, loss_of, mlp, sgd, train

import nmsparse_ext as nms
from nmsparse_ext.train import Sparsifier

LAMBDA = 0.05


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
