"""Statistics of batch norms, taken anew: pruning the layer before shifts what reaches them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..deploy.example import ExampleInput, run_example
from ..weights import canonical_name


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms of a model that keep statistics."""
    return {
        canonical_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def recalibrate_norms(
    model: nn.Module, norms: dict[str, _BatchNorm], batches: Iterable[ExampleInput]
) -> list[str]:
    """Sets running means and variances to the mean over batches of what reaches each batch norm.

    Each norm meanwhile normalises with the statistics of the batch, as in training; all other modules are in
    eval mode. Those that no batch reaches keep theirs.

    Args:
        model: The model.
        norms: Its batch norms.
        batches: What it is called with. Small batches make for poor statistics.

    Returns:
        Names of the batch norms that were reached.
    """
    names = {module: name for name, module in norms.items()}
    momenta = {module: module.momentum for module in names}
    counts = {module: _count(module) for module in names}
    seen: dict[_BatchNorm, int] = {}

    def before_forward(module: nn.Module, args: tuple, kwargs: dict) -> None:
        assert isinstance(module, _BatchNorm)
        input = args[0] if args else kwargs["input"]
        if input.numel() <= input.shape[1]:
            raise ValueError(
                f"{names[module]} gets one value a channel from a batch of calibration, which has no "
                "variance: give larger batches, or recalibrate=False"
            )
        seen[module] = seen.get(module, 0) + 1
        module.momentum = 1 / seen[module]  # the mean of all batches; the first one replaces what was there
        module.train()  # which the end of the run undoes

    try:
        for batch in batches:
            run_example(model, batch, dict.fromkeys(names, before_forward))
    finally:
        for module, momentum in momenta.items():
            module.momentum = momentum
            if module.num_batches_tracked is not None:
                module.num_batches_tracked.fill_(counts[module])
    return [names[module] for module in names if module in seen]


def _count(module: _BatchNorm) -> int:
    return 0 if module.num_batches_tracked is None else int(module.num_batches_tracked)
