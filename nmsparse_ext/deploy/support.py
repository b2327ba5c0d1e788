"""Which modules can multiply with a packed weight."""

from __future__ import annotations

from torch import Tensor, nn

from ..conv_panels import why_unaligned
from ..tensor import NMTensor


def why_not_packed(module: nn.Module, weight: Tensor) -> str | None:
    """Returns why ``module`` cannot run with ``weight`` packed, or ``None`` if nothing is known against it.

    Modules that call ``F.linear``, a convolution, ``mm`` or ``addmm`` with their weight can. A module of an
    unknown
    type is believed to: if it does something else, that raises and names the operation.
    """
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "an embedding looks rows up, which packed weights cannot"
    if isinstance(module, nn.RNNBase):
        return f"the fused kernels of {type(module).__name__} take dense weights only"
    # nn.modules.conv has no public name for what all convolutions have in common.
    if weight.dim() > 2 and not isinstance(module, nn.modules.conv._ConvNd):
        name = type(module).__name__
        return f"{weight.dim()}-D weights of {name} are batched products, which have no packed engine"
    return None


def why_unpacked(module: nn.Module, weight: Tensor) -> str | None:
    """Returns why ``module`` unpacks ``weight`` in every call, or ``None`` if it multiplies with it as it is.

    Besides the engine "decompress", which always does.
    """
    if not isinstance(weight, NMTensor) or not isinstance(module, nn.modules.conv._ConvNd):
        return None
    return None if weight.engine != "cpu-conv-panels" else why_unaligned(weight.shape[0], module.groups)
