"""N:M sparsity for PyTorch: choose a pattern, train with it, pack it, run it.

Example:
    >>> import nmsparse_ext as nms
    >>> pruned = nms.nm_prune(weight, "2:4")  # the two largest |w| of every four are kept, the rest are 0
    >>> packed = nms.compress(pruned, "2:4")  # half the values, and where they stood
    >>> y = nms.linear(x, packed)
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ._import_hook import import_after, import_before

if TYPE_CHECKING:  # what `__getattr__` brings when the program runs
    from . import compat as compat
    from . import deploy as deploy
    from . import integrations as integrations
    from . import optim as optim
    from . import prune as prune
    from . import search as search
    from . import train as train
    from ._build import build_info
    from .deploy import load_file, load_into, save_file
    from .deploy.convert import convert
    from .deploy.fold import fold_batch_norm
    from .deploy.summary import summary
    from .errors import FormatError
    from .int8 import int8_linear
    from .ops import find_violation, nm_mask, nm_prune, nm_prune_, sad, transposable_mask
    from .pattern import Pattern
    from .products import linear
    from .prune import prune_model
    from .scheme import Scheme
    from .search import Budget, domino_search
    from .search.allocate import allocate
    from .search.permute import permute_channels
    from .tensor import NMTensor, compress
    from .train import Sparsifier

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "FormatError",
    "NMTensor",
    "Pattern",
    "Scheme",
    "Sparsifier",
    "allocate",
    "build_info",
    "compress",
    "convert",
    "domino_search",
    "find_violation",
    "fold_batch_norm",
    "int8_linear",
    "linear",
    "load_file",
    "load_into",
    "nm_mask",
    "nm_prune",
    "nm_prune_",
    "permute_channels",
    "prune_model",
    "sad",
    "save_file",
    "summary",
    "transposable_mask",
]

# name -> the module that brings it, imported at first use: `nmsparse --help` does not wait for torch, and
# pruning does not wait for training and files.
_LAZY = {
    "Budget": "search",
    "FormatError": "errors",
    "NMTensor": "tensor",
    "Pattern": "pattern",
    "Scheme": "scheme",
    "Sparsifier": "train",
    "allocate": "search",
    "build_info": "_build",
    "compress": "tensor",
    "convert": "deploy",
    "domino_search": "search",
    "find_violation": "ops",
    "fold_batch_norm": "deploy",
    "int8_linear": "int8",
    "linear": "products",
    "load_file": "deploy",
    "load_into": "deploy",
    "nm_mask": "ops",
    "nm_prune": "ops",
    "nm_prune_": "ops",
    "permute_channels": "search",
    "prune_model": "prune",
    "sad": "ops",
    "save_file": "deploy",
    "summary": "deploy",
    "transposable_mask": "ops",
}

# Modules that need no torch, with all below them.
_WITHOUT_TORCH = ("__main__", "_import_hook", "cli", "errors", "pattern")

# Rooms with more than what stands here, such as `nms.train.Rule` or `nms.optim.SGD`.
_ROOMS = ("compat", "deploy", "integrations", "optim", "prune", "search", "train")


if not TYPE_CHECKING:  # else every misspelt name would be of type Any

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            if _LAZY[name] not in _WITHOUT_TORCH:
                import_module("torch")  # before a lock of ours is held: who imports torch comes for that next
            value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
            globals()[name] = value
            return value
        if not name.startswith("_") and "." not in name and find_spec(f"{__name__}.{name}") is not None:
            if name not in _WITHOUT_TORCH:
                import_module("torch")
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})


# Not at first use: torch.load has to know packed tensors, and torch.ops our ops, as soon as there is a torch.
if sys.modules.get("torch") is not None:
    import_module(f"{__name__}.tensor")  # its errors are the importer's; the hook keeps them from torch's
else:
    import_after("torch", f"{__name__}.tensor")
    import_before("torch", __name__, without=_WITHOUT_TORCH)

# transformers' models are saved and loaded packed. Not imported here: it takes seconds.
import_after("transformers.quantizers.auto", f"{__name__}.integrations.transformers")
