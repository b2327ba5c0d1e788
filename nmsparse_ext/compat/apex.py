"""NVIDIA apex's ``ASP`` (Automatic SParsity) on a `Sparsifier` with fixed masks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..deploy.example import ExampleInput
from ..pattern import Pattern
from ..registry import register_module
from ..scheme import ResolvedWeight, Scheme
from ..search.permute import permute_channels
from ..train import Sparsifier
from ..train.transposable import tile_dim, transposable_bits
from ..weights import Weight
from ..weights import weights as list_weights

_CALCULATOR = re.compile(r"m(\d+)n(\d+)_(1d|2d)(_best|_greedy)?")
_WHITELIST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


class ASP:
    """``apex.contrib.sparsity.ASP``: prune once, train on with the masks as they are.

    Class methods only, one model and one optimizer at a time, as in the original; `reset` forgets them.

    Differs from the original:

    - any pattern (``"m8n2_1d"`` keeps 2 of every 8), on any device; of equal weights the first is kept;
    - ``"m4n2_2d..."`` takes the exact best mask of each 4x4 tile, greedy or not;
    - no buffers ``__weight_mma_mask`` are added: zeros in the weights are what a checkpoint says;
    - ``optimizer.step`` is not replaced: a `Sparsifier` hooks onto it, so the optimizer's momenta of pruned
      weights are zero, too;
    - channels are reordered if ``example_input`` is given. By default they are not, where the original tries.

    As in the original, layers whose first size is no multiple of 8 or whose second is none of 16 are left
    out (here in every dtype): `scheme` says so.
    """

    _model: nn.Module | None = None
    _optimizer: torch.optim.Optimizer | None = None
    _scheme: Scheme | None = None
    _sparsifier: Sparsifier | None = None
    _transposable = False
    _recompute = False
    _example: ExampleInput | None = None
    _pruned: Mapping[str, Tensor] = {}
    _sparse = False

    @classmethod
    def init_model_for_pruning(
        cls,
        model: nn.Module,
        mask_calculator: str = "m4n2_1d",
        verbosity: int = 3,
        whitelist: Sequence[type[nn.Module]] = _WHITELIST,
        allowed_layer_names: Iterable[str] | None = None,
        disallowed_layer_names: Iterable[str] = (),
        allow_recompute_mask: bool = False,
        custom_layer_dict: Mapping[type[nn.Module], Sequence[str]] | None = None,
        allow_permutation: bool = True,
        example_input: ExampleInput | None = None,
    ) -> None:
        """Says which weights are to be sparse. Nothing is changed yet.

        Args:
            model: The model.
            mask_calculator: ``"m4n2_1d"``: of every 4 weights 2 are **kept**; ``"m4n2_2d_best"``: along
                columns, too.
            verbosity: 1 or more prints what is left out because of its size, as the original does.
            whitelist: Types of modules.
            allowed_layer_names: If given, only modules of these names.
            disallowed_layer_names: All but modules of these names.
            allow_recompute_mask: Keep pruned values on the CPU, to restore them.
            custom_layer_dict: ``{module type: [parameter name, ...]}``, grouped along dim 1; see
                `register_module` for others.
            allow_permutation: Reorder channels, if there is an ``example_input``.
            example_input: What the model is called with.

        Raises:
            RuntimeError: If it has been called before.
            ValueError: If ``mask_calculator`` is unknown.
        """
        if cls._model is not None:
            raise RuntimeError("ASP has been initialised already: call ASP.reset() before")
        match = _CALCULATOR.fullmatch(mask_calculator) if isinstance(mask_calculator, str) else None
        if match is None or (match[3] == "2d" and mask_calculator[:4] != "m4n2"):
            raise ValueError(
                'mask_calculator must look like "m4n2_1d", or be "m4n2_2d_best" or "m4n2_2d_greedy", '
                f"got {mask_calculator!r}"
            )
        pattern = Pattern(int(match[2]), int(match[1]))
        for kind, names in (custom_layer_dict or {}).items():
            register_module(kind, dict.fromkeys(names, 1))
        kinds = (*whitelist, *(custom_layer_dict or {}))
        allowed = None if allowed_layer_names is None else set(allowed_layer_names)
        disallowed = set(disallowed_layer_names)
        names_of = {id(module): name for name, module in model.named_modules()}
        patterns: dict[str, Pattern] = {}
        dense: dict[str, str] = {}
        for weight in list_weights(model):
            module = names_of[id(weight.module)]
            listed = module not in disallowed and (allowed is None or module in allowed)
            if not (listed and isinstance(weight.module, kinds)):
                dense[weight.name] = "not on the lists"
            elif (why := weight.dense_because or _size(weight) or weight.misfit(pattern)) is not None:
                dense[weight.name] = why
                if verbosity >= 1:
                    print(f"[ASP] {weight.name} stays dense: {why}")
            else:
                patterns[weight.name] = pattern
        cls._model, cls._scheme = model, Scheme(patterns, dense=dense)
        cls._transposable, cls._recompute = match[3] == "2d", allow_recompute_mask
        cls._example = example_input if allow_permutation else None

    @classmethod
    def init_optimizer_for_pruning(cls, optimizer: torch.optim.Optimizer) -> None:
        """Has the optimizer keep pruned weights at zero, once there are masks."""
        cls._check("init_optimizer_for_pruning")
        if cls._optimizer is not None:
            raise RuntimeError("ASP has an optimizer already: call ASP.reset() before")
        cls._optimizer = optimizer

    @classmethod
    def compute_sparse_masks(cls) -> None:
        """Chooses masks by magnitude, and prunes. Again, if ``allow_recompute_mask`` was given."""
        model, scheme = cls._check("compute_sparse_masks")
        if cls._sparse:
            cls.restore_pruned_weights()
        if cls._example is not None:
            permute_channels(model, scheme, cls._example)
        resolved = scheme.resolve(model)
        before = {n: w.parameter.detach().to("cpu", copy=True) for n, w in resolved.items()}
        if cls._optimizer is not None:
            cls._sparsifier = Sparsifier(
                model, cls._optimizer, scheme, method="static", transposable=cls._transposable
            )
        else:
            for weight in resolved.values():
                _prune(weight, cls._transposable)
        if cls._recompute:
            cls._pruned = {
                name: torch.where(weight.parameter.detach().cpu() == 0, before[name], 0)
                for name, weight in resolved.items()
            }
        cls._sparse = True

    @classmethod
    def restore_pruned_weights(cls) -> None:
        """Puts pruned values back, and lets them be trained.

        Raises:
            RuntimeError: If ``allow_recompute_mask`` was not given.
        """
        model, scheme = cls._check("restore_pruned_weights")
        if not cls._sparse:
            return
        if not cls._recompute:
            raise RuntimeError(
                "pruned values are gone: give allow_recompute_mask=True before they are pruned"
            )
        if cls._sparsifier is not None:
            cls._sparsifier.finalize()
            cls._sparsifier = None
        with torch.no_grad():
            for name, weight in scheme.resolve(model).items():
                weight.parameter.add_(cls._pruned[name].to(weight.parameter.device))
        cls._pruned, cls._sparse = {}, False

    @classmethod
    def prune_trained_model(cls, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        """All in one: 2:4 in linear layers, two-dimensional convolutions and attention.

        Equivalent to ``nms.Sparsifier(model, optimizer, "2:4", method="static")``, but for what is left out.

        Args:
            model: The model, trained.
            optimizer: Its optimizer.
            **options: For `init_model_for_pruning`.
        """
        options = {"whitelist": (nn.Linear, nn.Conv2d, nn.MultiheadAttention), "verbosity": 2, **options}
        cls.init_model_for_pruning(model, **options)
        cls.init_optimizer_for_pruning(optimizer)
        cls.compute_sparse_masks()

    @classmethod
    def is_sparsity_enabled(cls) -> bool:
        """Whether there are masks now."""
        return cls._sparse

    @classmethod
    def scheme(cls) -> Scheme:
        """Which weights are sparse, and why others are not; not in the original."""
        return cls._check("scheme")[1]

    @classmethod
    def reset(cls) -> None:
        """Forgets model and optimizer; weights stay as they are. Not in the original."""
        if cls._sparsifier is not None:
            cls._sparsifier.finalize()
        cls._model = cls._optimizer = cls._scheme = cls._sparsifier = cls._example = None
        cls._pruned, cls._sparse = {}, False

    @classmethod
    def _check(cls, what: str) -> tuple[nn.Module, Scheme]:
        if cls._model is None or cls._scheme is None:
            raise RuntimeError(f"{what} needs a model: call ASP.init_model_for_pruning before")
        return cls._model, cls._scheme


def _size(weight: Weight) -> str | None:
    """Why the original leaves a weight out, if it does."""
    first, second = weight.parameter.shape[:2]
    if first % 8 or second % 16:
        return f"its sizes {first} and {second} are no multiples of 8 and 16"
    return None


def _prune(weight: ResolvedWeight, transposable: bool) -> None:
    values, dim = weight.parameter.detach(), weight.group_dim
    if transposable:
        bits = transposable_bits(values, dim, tile_dim(weight)).contiguous()
        ops.apply_bits_(values, bits, dim=dim)
    else:
        ops.nm_prune_(values, weight.pattern, dim=dim)
