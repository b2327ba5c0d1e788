"""Which modules can multiply with a packed weight."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from ..conv_panels import why_unaligned
from ..engines import Engine, best_engine, best_stack_engine, find_engine
from ..tensor import Keep, NMTensor


def why_not_packed(module: nn.Module, weight: Tensor) -> str | None:
    """Returns why ``module`` cannot run with ``weight`` packed, or ``None`` if nothing is known against it.

    Modules that call ``F.linear``, a convolution or a matrix product with their weight can. A module of an
    unknown type is believed to: if it does something else, that raises and names the operation.
    """
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "an embedding looks rows up, which packed weights cannot"
    if isinstance(module, nn.RNNBase):
        return f"the fused kernels of {type(module).__name__} take dense weights only"
    if weight.dim() > 3 and not _is_conv(module):
        return f"{weight.dim()}-D weights of {type(module).__name__} are no stack of matrices"
    return None


def why_unpacked(module: nn.Module, weight: Tensor) -> str | None:
    """Returns why ``module`` unpacks ``weight`` in every call, or ``None`` if it multiplies with it as it is.

    Besides the engine "decompress", which always does.
    """
    if not isinstance(weight, NMTensor) or not _is_conv(module):
        return None
    return None if weight.engine != "cpu-conv-panels" else why_unaligned(weight.shape[0], module.groups)


def engine_for(module: nn.Module, weight: NMTensor) -> Engine:
    """The engine for the products that ``module`` makes with its weight."""
    is_stack = len(weight.rows) == 2 and not _is_conv(module)
    return best_stack_engine(weight) if is_stack else best_engine(weight)


def with_engine_for(module: nn.Module, weight: NMTensor, engine: str | None, keep: Keep) -> NMTensor:
    """The weight as ``module`` runs it best: by the engine that was asked for, or else the best that can.

    Args:
        module: What multiplies with it.
        weight: The weight; returned as it is if nothing changes.
        engine: Name of the engine that was asked for; ``None`` means the best, as where that cannot run it.
        keep: As of `NMTensor.with_engine`; ``"both"`` where the engine's form cannot be kept alone.
    """
    chosen = engine_for(module, weight)
    if engine is not None and find_engine(engine).why_not(weight) is None:
        chosen = find_engine(engine)
    alone: Keep = keep if chosen.restore is not None else "both"
    if (chosen.name, alone) == (weight.engine, weight.keep):
        return weight
    return weight.with_engine(chosen.name, keep=alone)


def _is_conv(module: nn.Module) -> TypeGuard[nn.modules.conv._ConvNd]:
    # nn.modules.conv has no public name for what all convolutions have in common.
    return isinstance(module, nn.modules.conv._ConvNd)


def dtensor_type() -> type | tuple[()]:
    """``DTensor``, or nothing at all where this torch has no distributed package."""
    if not torch.distributed.is_available():
        return ()
    from torch.distributed.tensor import DTensor

    return DTensor
