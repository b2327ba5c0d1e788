"""What each method does to the weights, against a re-enactment in plain PyTorch."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from train.common import assert_satisfies, batch, loss_of, mlp, train

import nmsparse_ext as nms
from nmsparse_ext import ops
from nmsparse_ext.train import Rule, Sparsifier, SrSte, Static, Ste

LR, MOMENTUM, DECAY, LAMBDA = 0.5, 0.9, 1e-3, 0.05
WEIGHTS = ("0.weight", "2.weight")


def sgd(model: nn.Module, **kwargs: object) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY, **kwargs)


def reenact(steps: int, lambda_w: float) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """SR-STE with SGD, written out: returns dense weights, sparse weights and losses."""
    model = mlp()
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    momentum = {name: torch.zeros_like(p) for name, p in dense.items()}
    losses = []
    for step in range(steps):
        masks = {name: nms.nm_mask(dense[name], "2:4") for name in WEIGHTS}
        for name, p in model.named_parameters():
            p.data = torch.where(masks[name], dense[name], 0) if name in masks else dense[name]
            p.grad = None
        loss = loss_of(model, batch(step))
        loss.backward()
        losses.append(loss.item())
        for name, p in model.named_parameters():
            pulled = (lambda_w * dense[name]).masked_fill(masks[name], 0) if name in masks else 0
            g = p.grad + pulled
            g = g + DECAY * dense[name]
            momentum[name] = g if step == 0 else MOMENTUM * momentum[name] + g
            dense[name] = dense[name] - LR * momentum[name]
    sparse = {name: nms.nm_prune(w, "2:4") if name in WEIGHTS else w for name, w in dense.items()}
    return dense, sparse, losses


@pytest.mark.parametrize(("method", "lambda_w"), [("sr-ste", LAMBDA), ("sr-ste", -LAMBDA), ("ste", 0.0)])
@pytest.mark.parametrize("implementation", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_equals_its_definition(method: str, lambda_w: float, implementation: dict[str, bool]) -> None:
    model = mlp()
    optimizer = sgd(model, **implementation)
    sparsifier = Sparsifier(model, optimizer, "2:4", method=method, lambda_w=lambda_w)
    losses = train(model, optimizer, 8)
    dense, sparse, expected = reenact(8, lambda_w)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), sparse[name], rtol=1e-12, atol=1e-14)
    for name in WEIGHTS:
        torch.testing.assert_close(sparsifier.dense_weight(name), dense[name], rtol=1e-12, atol=1e-14)
        assert torch.equal(sparsifier.masks[name], nms.nm_mask(dense[name], "2:4"))


def test_lambda_matters() -> None:
    """Guards the test above against comparing nothing with nothing."""
    assert reenact(8, LAMBDA)[2] != reenact(8, 0.0)[2]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=1e-2),
        lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=1e-2),
        lambda p: torch.optim.Adagrad(p, lr=1e-2),
        lambda p: torch.optim.SGD(p, lr=1e-2),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
        lambda p: torch.optim.NAdam(p, lr=1e-2),
        lambda p: torch.optim.Adafactor(p, lr=1e-2),
    ],
)
def test_any_optimizer(make) -> None:
    """With λ the dense weight is updated as the optimizer would update an ordinary one with the term in its
    gradient."""
    model, twin = mlp(), mlp()
    optimizer, plain = make(model.parameters()), make(twin.parameters())
    sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
    dense = {name: p.detach().clone() for name, p in twin.named_parameters()}
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        for (name, p), q in zip(twin.named_parameters(), model.parameters(), strict=True):
            p.data.copy_(dense[name])
            p.grad = q.grad.clone()
            if name in WEIGHTS:
                p.grad += (LAMBDA * p.detach()).masked_fill(nms.nm_mask(p.detach(), "2:4"), 0)
        optimizer.step()
        plain.step()
        dense = {name: p.detach().clone() for name, p in twin.named_parameters()}
        assert_satisfies(model, sparsifier.scheme)
    for name in WEIGHTS:
        torch.testing.assert_close(sparsifier.dense_weight(name), dense[name], rtol=1e-12, atol=1e-14)


def test_weights_satisfy_the_scheme_from_the_start_and_after_every_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1),
        nn.Flatten(),
        nn.Linear(16, 32),
        nn.Linear(32, 4),
    ).to(memory_format=torch.channels_last)
    scheme = nms.Scheme({"0": "1:8", "2": "2:4", "4": "2:8", "5": "7:16"})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    sparsifier = Sparsifier(model, optimizer, scheme)
    names = {name: sparsifier.scheme[name] for name in sparsifier.masks}
    assert_satisfies(model, names)
    layout = [p.stride() for p in model.parameters()]
    for step in range(5):
        optimizer.zero_grad()
        model(batch(step, torch.float32)[:8].new_ones(8, 8, 3, 3)).pow(2).sum().backward()
        optimizer.step()
        assert_satisfies(model, names)
        for name in names:
            kept = sparsifier.masks[name]
            p = dict(model.named_parameters())[name]
            assert torch.equal(p.detach(), torch.where(kept, sparsifier.dense_weight(name), 0.0))
    assert [p.stride() for p in model.parameters()] == layout


class TestStatic:
    def test_keeps_the_mask_and_trains_only_what_is_kept(self) -> None:
        model = mlp()
        optimizer = sgd(model)
        sparsifier = Sparsifier(model, optimizer, "2:4", method="static")
        masks = {name: sparsifier.masks[name] for name in WEIGHTS}
        pruned = {name: sparsifier.dense_weight(name)[~masks[name]].clone() for name in WEIGHTS}
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for step in range(6):
            train(model, optimizer, 1, start=step)
            assert sum(sparsifier.sad().values()) == 0
        for name in WEIGHTS:
            p = model.get_parameter(name).detach()
            assert torch.equal(sparsifier.masks[name], masks[name])
            assert not p[~masks[name]].any()
            assert (p[masks[name]] != before[name][masks[name]]).all()
        # Only weight decay has touched what was pruned.
        shrunk = sparsifier.dense_weight("0")[~masks["0.weight"]]
        assert (shrunk.abs() <= pruned["0.weight"].abs()).all()
        assert torch.equal(shrunk.sign(), pruned["0.weight"].sign())

    def test_leaves_no_trace_in_momenta(self) -> None:
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters())
        sparsifier = Sparsifier(model, optimizer, "2:4", method="static")
        train(model, optimizer, 3)
        for name in WEIGHTS:
            state = optimizer.state[model.get_parameter(name)]
            assert not state["exp_avg"][~sparsifier.masks[name]].any()
            assert state["exp_avg"][sparsifier.masks[name]].all()

    def test_equals_masked_training(self) -> None:
        """As if gradients and weights had been multiplied by the mask by hand."""
        model, twin = mlp(), mlp()
        optimizer, plain = sgd(model), sgd(twin)
        Sparsifier(model, optimizer, "2:4", method="static")
        masks = {name: nms.nm_mask(twin.get_parameter(name).detach(), "2:4") for name in WEIGHTS}
        for step in range(5):
            with torch.no_grad():
                for name in WEIGHTS:
                    twin.get_parameter(name).mul_(masks[name])
            plain.zero_grad()
            loss_of(twin, batch(step)).backward()
            for name in WEIGHTS:
                twin.get_parameter(name).grad.mul_(masks[name])
            plain.step()
        train(model, optimizer, 5)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


class TestDecoupled:
    @pytest.mark.parametrize("tensor_lr", [False, True])
    def test_decays_the_pruned_weights_beside_the_optimizer(self, tensor_lr: bool) -> None:
        def make(p):
            return torch.optim.AdamW(p, lr=torch.tensor(1e-2) if tensor_lr else 1e-2, foreach=False)

        model, twin = mlp(), mlp()
        optimizer, plain = make(model.parameters()), make(twin.parameters())
        sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA, penalty="decoupled")
        dense = {name: p.detach().clone() for name, p in twin.named_parameters()}
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, batch(step)).backward()
            for (name, p), q in zip(twin.named_parameters(), model.parameters(), strict=True):
                p.data.copy_(dense[name])
                p.grad = q.grad.clone()
                if name in WEIGHTS:
                    p.data.sub_((1e-2 * LAMBDA * p.detach()).masked_fill(nms.nm_mask(p.detach(), "2:4"), 0))
            optimizer.step()
            plain.step()
            dense = {name: p.detach().clone() for name, p in twin.named_parameters()}
        for name in WEIGHTS:
            torch.testing.assert_close(sparsifier.dense_weight(name), dense[name], rtol=1e-8, atol=1e-10)

    def test_equals_the_published_form_for_plain_sgd(self) -> None:
        results = []
        for penalty in ("gradient", "decoupled"):
            model = mlp()
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA, penalty=penalty)
            results.append(train(model, optimizer, 5))
        torch.testing.assert_close(*results, rtol=1e-12, atol=0)

    def test_a_group_without_lr_is_refused(self) -> None:
        class NoLr(torch.optim.Optimizer):
            def __init__(self, params):
                super().__init__(params, {})

            def step(self, closure=None):
                return None

        model = mlp()
        with pytest.raises(ValueError, match="lr"):
            Sparsifier(model, NoLr(model.parameters()), "2:4", penalty="decoupled")


def test_maximizing_pulls_pruned_weights_towards_zero_too() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, maximize=True)
    sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
    before, pruned = sparsifier.dense_weight("0").clone(), ~sparsifier.masks["0"]
    loss_of(model, batch(0)).backward()
    model[0].weight.grad.zero_()
    optimizer.step()
    torch.testing.assert_close(sparsifier.dense_weight("0")[pruned], before[pruned] * (1 - LR * LAMBDA))


class TestOwnRule:
    def test_twenty_lines_are_enough(self) -> None:
        """Decaying masks: pruned weights fade out of the forward pass instead of vanishing at once."""

        class DecayingMask(Rule):
            def __init__(self, steps: int) -> None:
                self.steps = steps

            def soften(self, weight, out, step):
                left = max(0.0, 1 - step.number / self.steps)
                ops.add_pruned_(out, weight.dense, weight.bits, dim=weight.dim, alpha=left)

        model = mlp()
        optimizer = sgd(model)
        sparsifier = Sparsifier(model, optimizer, "2:4", method=DecayingMask(4))
        for step in range(5):
            p, dense = model[0].weight.detach(), sparsifier.dense_weight("0")
            pruned = ~sparsifier.masks["0"]
            torch.testing.assert_close(p[pruned], dense[pruned] * (1 - step / 4), rtol=1e-12, atol=0)
            assert torch.equal(p[~pruned], dense[~pruned])
            if step < 4:
                train(model, optimizer, 1, start=step)
        assert_satisfies(model, sparsifier.scheme)

        # It survives a checkpoint in the middle, and writes of the same values.
        model = mlp()
        optimizer = sgd(model)
        Sparsifier(model, optimizer, "2:4", method=DecayingMask(8))
        train(model, optimizer, 3)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        losses = train(model, optimizer, 3, start=3)
        other = mlp(seed=7)
        resumed = sgd(other)
        sparsifier = Sparsifier(other, resumed, "2:4", method=DecayingMask(8))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            resumed.load_state_dict(saved[1])
            other.load_state_dict(saved[0])
            assert train(other, resumed, 3, start=3) == losses
        assert nms.find_violation(other[0].weight.detach(), "2:4") is not None
        sparsifier.finalize()
        assert_satisfies(other, sparsifier.scheme)

    def test_sees_step_and_group(self) -> None:
        seen = []

        class Spy(Rule):
            def adjust_grad(self, weight, grad, step):
                seen.append((weight.name, step.number, step.group["lr"], tuple(grad.shape)))

        model = mlp()
        optimizer = torch.optim.SGD(
            [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}], 0.2
        )
        Sparsifier(model, optimizer, "2:4", method=Spy())
        train(model, optimizer, 2)
        assert seen == [
            ("0.weight", 1, 0.1, (8, 16)),
            ("2.weight", 1, 0.2, (4, 8)),
            ("0.weight", 2, 0.1, (8, 16)),
            ("2.weight", 2, 0.2, (4, 8)),
        ]

    def test_reprs_say_what_is_used(self) -> None:
        assert repr(SrSte(0.5)) == "SrSte(lambda_w=0.5, penalty='gradient')"
        assert [repr(Ste()), repr(Static())] == ["Ste()", "Static()"]
        model = mlp()
        sparsifier = Sparsifier(model, sgd(model), {"0": "1:4"})
        assert repr(sparsifier) == "Sparsifier(1 x 1:4; SrSte(lambda_w=0.0002, penalty='gradient'), step 0)"


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"method": "srste"}, ValueError, "'sr-ste', 'ste', 'static' or a Rule, got 'srste'"),
        ({"method": SrSte}, TypeError, "or a Rule"),
        ({"lambda_w": float("nan")}, ValueError, "lambda_w must be finite"),
        ({"lambda_w": "big"}, TypeError, "lambda_w must be a number"),
        ({"penalty": "l2"}, ValueError, 'penalty must be "gradient" or "decoupled", got \'l2\''),
    ],
)
def test_wrong_arguments(kwargs: dict[str, object], error: type[Exception], match: str) -> None:
    model = mlp()
    with pytest.raises(error, match=match):
        Sparsifier(model, sgd(model), "2:4", **kwargs)
