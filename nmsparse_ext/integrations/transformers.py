"""Packed models in `transformers`: ``save_pretrained``, ``from_pretrained``, and packing while loading.

A model that `nms.convert` or `nms.load_into` has packed is saved and loaded like any other::

    nms.convert(model, policy="always")
    model.save_pretrained("folder")  # safetensors in the portable form, the patterns in config.json
    model = AutoModel.from_pretrained("folder")  # packed; no weight is dense on the way

and a dense checkpoint is packed while it is loaded::

    model = AutoModel.from_pretrained("dense", quantization_config=NMSparseConfig("2:4"))

Both go through `transformers`' public registration of quantizers. It is made when `transformers` is imported
by whoever needs it, if ``nmsparse_ext`` is imported, too; importing this module by name does it as well.
It needs transformers 5.0 or newer (tested with 5.0.0 and 5.24.0).
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

try:
    import transformers.core_model_loading  # noqa: F401 - new in transformers 5, as is how it loads and saves
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(
        f"nmsparse_ext.integrations.transformers needs transformers 5.0 or newer: {error}"
    ) from error

from ..deploy.convert import convert, ignore_in_ddp
from ..deploy.detect import has_nonzero
from ..deploy.format import VALUES, Contents, brief
from ..deploy.listeners import when_packed
from ..deploy.stored import layout
from ..engines import find_engine
from ..errors import FormatError
from ..ops import find_violation, nm_prune_
from ..pattern import Pattern
from ..scheme import Scheme
from ..tensor import KEEPS, Keep, NMTensor
from ..weights import canonical_name, weights
from .checkpoint_names import check_entry, file_names, names_in, read_entries
from .placeholders import fill_room, make_room

METHOD = "nmsparse"
VERSION = 1


@register_quantization_config(METHOD)
class NMSparseConfig(QuantizationConfigMixin):
    """What ``config.json`` says about packed weights, and what to pack when a dense checkpoint is loaded.

    Args:
        scheme: Patterns of the weights: one for all that can have it (``"2:4"``), or by parameter name.
            ``None`` detects what each weight holds. In a saved ``config.json`` it is by name and complete.
        prune: Prune weights that do not satisfy their pattern by the selection rule (the largest absolute
            values of each group are kept). Without it they stay dense, and a warning names them.
        skip: Parameter names, module names or globs of what stays dense, for example ``["lm_head"]``. Not
            with a scheme by name.
        engine: Name of the engine to run packed weights with; ``None`` chooses.
        keep: ``"engine"`` holds only what the engine multiplies with; see `NMTensor.keep`.
        group_dims: The dims that groups run along, of weights for which it is not the registry's.
        version: Version of these entries.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is not allowed.
    """

    def __init__(
        self,
        scheme: Scheme | Mapping[str, Pattern | str] | Pattern | str | None = None,
        *,
        prune: bool = False,
        skip: Iterable[str] = (),
        engine: str | None = None,
        keep: Keep = "both",
        group_dims: Mapping[str, int] | None = None,
        version: int = VERSION,
        quant_method: str = METHOD,
    ) -> None:
        if quant_method != METHOD:
            raise ValueError(f"quant_method must be {METHOD!r}, got {quant_method!r}")
        if type(version) is not int or version != VERSION:
            raise FormatError(f"version {version!r} of {METHOD} configs is not known, only {VERSION}")
        if keep not in KEEPS:
            raise ValueError(f"keep must be one of {KEEPS}, got {keep!r}")
        if not isinstance(prune, bool):
            raise TypeError(f"prune must be True or False, got {prune!r}")
        if engine is not None:
            find_engine(engine)
        self.quant_method: Any = METHOD  # of others', an enum
        self.version = version
        # Plain JSON types, as transformers writes what it finds here.
        self.scheme: str | dict[str, str] | None = None
        if isinstance(scheme, (str, Pattern)):
            self.scheme = str(Pattern.parse(scheme, argument="scheme"))
        elif scheme is not None:
            if not isinstance(scheme, Mapping):
                raise TypeError(
                    'scheme must be a pattern such as "2:4", a mapping of parameter names to patterns, or '
                    f"None, got {scheme!r} of type {type(scheme).__name__}"
                )
            named = scheme if isinstance(scheme, Scheme) else Scheme(scheme)
            self.scheme = {name: str(pattern) for name, pattern in named.items()}
        self.skip = _names("skip", skip)
        if self.skip and isinstance(self.scheme, dict):
            raise ValueError("skip goes with one pattern for all; of a scheme by name leave names out")
        self.prune = prune
        if self.prune and self.scheme is None:
            raise ValueError("prune needs a scheme: which pattern?")
        self.engine = engine
        self.keep = keep
        self.group_dims = _dims(group_dims or {})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Reads ``quantization_config`` of a ``config.json``; for the arguments see `transformers`.

        Raises:
            FormatError: If it has keys that are not known, or is of another version.
            TypeError: If a value is of the wrong type.
            ValueError: If a value is not allowed.
        """
        known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        unknown = [name for name in config_dict if name not in known]
        # Of another version, that is what is wrong, and __init__ says it.
        if unknown and config_dict.get("version", VERSION) == VERSION:
            raise FormatError(
                f"quantization_config of {METHOD} must have no keys but {', '.join(known)}, "
                f"got {brief(unknown)}"
            )
        known_entries = {name: value for name, value in config_dict.items() if name in known}
        return super().from_dict(known_entries, return_unused_kwargs, **kwargs)

    def resolve(self, model: nn.Module) -> dict[str, Pattern]:
        """Patterns of the weights of ``model``, by name; empty if the scheme is to be detected."""
        if self.scheme is None:
            return {}
        if isinstance(self.scheme, str):
            return dict(Scheme.uniform(model, self.scheme, skip=self.skip))
        return {name: resolved.pattern for name, resolved in Scheme(self.scheme).resolve(model).items()}


@register_quantizer(METHOD)
class NMSparseQuantizer(HfQuantizer):
    """Loads and saves packed models for `transformers`, which makes it from an `NMSparseConfig`."""

    requires_calibration = False
    ties: dict[str, str]

    @property
    def config(self) -> NMSparseConfig:
        """The quantization config."""
        return cast(NMSparseConfig, self.quantization_config)

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses to offload: what lies elsewhere between calls cannot be packed weights.

        Raises:
            ValueError: If ``device_map`` sends modules to the disk, or to CPU memory from a GPU.
        """
        if not isinstance(device_map, Mapping):
            return
        targets = {str(target) for target in device_map.values()}
        if "disk" in targets or ("cpu" in targets and len(targets) > 1):
            raise ValueError(
                "device_map must not offload (modules on 'disk', or on 'cpu' beside another device): packed "
                f"weights stay where they run; got {dict(device_map)}"
            )

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Saved as safetensors only."""
        return safe_serialization is not False

    @property
    def is_trainable(self) -> bool:
        """Packed weights are frozen; everything else, and adapters, train."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether `Trainer` may train the model as it is: what is not packed."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Packed weights work under ``torch.compile``."""
        return True

    # ------------------------------------------------------------------------------------------------ loading

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Makes room for the packed weights of the file; of a dense checkpoint nothing is to be done yet."""
        if not self.pre_quantized:
            return model
        scheme = self.config.scheme
        if not isinstance(scheme, dict):
            raise FormatError("quantization_config of a packed checkpoint must have a scheme by name")
        by_name = {name: weight for weight in weights(model) for name in weight.names}
        found = names_in(model, scheme, by_name)
        if not found:
            raise ValueError(
                f"quantization_config names {', '.join(list(scheme)[:3])}, ..., of which "
                f"{type(model).__name__} has none"
            )
        dims = names_in(model, self.config.group_dims, by_name)
        patterns = {name: Pattern.parse(text) for name, text in found.items()}
        make_room(by_name, patterns, dims)
        entries = names_in(model, read_entries(scheme, kwargs.get("checkpoint_files") or ()), by_name)
        for name in patterns.keys() & entries.keys():
            check_entry(name, entries[name], patterns[name], dims.get(name, by_name[name].group_dim))
        # transformers ties what its classes say is tied. Packed weights are tied after loading.
        ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
        self.ties = {target: ties.pop(target) for target in list(ties) if target in found}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Checks and puts together what was loaded, or packs the dense weights that were."""
        if getattr(model, "_tp_size", None) is not None:
            raise ValueError("packed weights cannot be split over devices: leave tp_plan out")
        config = self.config
        if self.pre_quantized:
            fill_room(model, engine=config.engine, keep=config.keep)
            for target, source in self.ties.items():
                parent, _, attr = target.rpartition(".")
                setattr(model.get_submodule(parent), attr, model.get_parameter(source))
            getattr(model, "all_tied_weights_keys", {}).update(self.ties)
            ignore_in_ddp(model)
        else:
            self.pre_quantized = True
            _pack(model, config)
        # For transformers a quantized model is one whose dtype is fixed and that cannot be trained.
        model.is_quantized = False
        attach(model)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        """Makes all packed weights dense, for ``model.dequantize()``."""
        done: dict[int, nn.Parameter] = {}
        for weight in weights(model):
            if not isinstance(weight.parameter, NMTensor):
                continue
            dense = nn.Parameter(weight.parameter.to_dense(dtype))
            for module, attr in weight.places:
                setattr(module, attr, done.setdefault(id(weight.parameter), dense))
        return model

    # ------------------------------------------------------------------------------------------------- saving

    def get_state_dict_and_metadata(
        self, model: Any, safe_serialization: bool | None = None
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What is written, and what the files say about it; ``config.json`` is brought up to date.

        Called by ``save_pretrained``.

        Raises:
            ValueError: If the model holds what cannot be saved packed; the message says what.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only adapters are written, which hold nothing packed
        tensors = model.state_dict(keep_vars=True)
        packed = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, NMTensor)}
        if not packed:
            if isinstance(getattr(model.config, "quantization_config", None), NMSparseConfig):
                del model.config.quantization_config
            return None, {}
        offloaded = [name for name, tensor in tensors.items() if tensor.is_meta]
        if offloaded:
            raise ValueError(
                f"{', '.join(offloaded)} cannot be saved: offloaded, without memory of their own"
            )
        ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
        for name in packed:
            if name in ties and tensors[ties[name]] is not tensors[name]:
                raise ValueError(
                    f"{name} is packed, but the model's config ties it to {ties[name]}, which it would "
                    "become when loaded: untie them (config.tie_word_embeddings = False) in a new model first"
                )
        model.config.quantization_config = _config_of(model, packed)
        # What transformers ties on loading comes last: then it is the alias, and not what is stored. A packed
        # weight is stored under each of its names.
        ordered = {name: tensors[name] for name in sorted(tensors, key=lambda name: name in ties)}
        twice = {name: cast(NMTensor, tensors[name]).clone() for name in packed if name in ties}
        stored, contents = layout(ordered | twice)
        names = file_names(model, stored, contents.weights)
        written = Contents(
            {names[name + VALUES].removesuffix(VALUES): entry for name, entry in contents.weights.items()},
            {alias: names[name] for alias, name in contents.aliases.items() if name in names},
        )
        return stored, written.to_metadata()


def attach(model: nn.Module) -> nn.Module:
    """Makes the `transformers` models in ``model`` that hold packed weights ready for ``save_pretrained``.

    `nms.convert` and `nms.load_into` do this themselves. Call it after putting packed weights into a model by
    hand.

    Args:
        model: A ``PreTrainedModel``, or a module around some; changed in place.

    Returns:
        ``model``.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:  # then no model can be one of theirs
        return model
    for module in model.modules():
        if not isinstance(module, modeling.PreTrainedModel):
            continue
        packed = {name: tensor for name, tensor in module.named_parameters() if isinstance(tensor, NMTensor)}
        current = getattr(module, "hf_quantizer", None)
        if packed and (current is None or isinstance(current, NMSparseQuantizer)):
            config = _config_of(module, packed)
            module.hf_quantizer = NMSparseQuantizer(config)
            module.quantization_method = METHOD
            if module is model or module.config is not getattr(model, "config", None):
                module.config.quantization_config = config
    return model


when_packed(attach)


# --------------------------------------------------------------------------------------------------- helpers


def _pack(model: nn.Module, config: NMSparseConfig) -> None:
    """Packs a dense model as the config says."""
    patterns: dict[str, Pattern] | None = None
    if config.scheme is not None:
        patterns = config.resolve(model)
        listed = {weight.name: weight for weight in weights(model)}
        violating = []
        for name, pattern in list(patterns.items()):
            weight = listed[name]
            assert weight.group_dim is not None  # resolve() refuses others
            data = weight.parameter.detach()
            if config.prune:
                nm_prune_(data, pattern, dim=weight.group_dim)
            if not has_nonzero(data) or find_violation(data, pattern, dim=weight.group_dim) is not None:
                violating.append(name)
                del patterns[name]
        if violating:
            warnings.warn(
                f"{len(violating)} of {len(violating) + len(patterns)} weights do not satisfy their pattern "
                f"and stay dense: {', '.join(violating[:5])}{', ...' if len(violating) > 5 else ''}. "
                "NMSparseConfig(prune=True) prunes them",
                UserWarning,
                stacklevel=2,
            )
    convert(model, patterns, policy="always", engine=config.engine, keep=config.keep)


def _config_of(model: nn.Module, packed: Mapping[str, NMTensor]) -> NMSparseConfig:
    """The config of a model as it is now."""
    registry = {name: weight.group_dim for weight in weights(model) for name in weight.names}
    names = {name: canonical_name(name) for name in packed}
    any_weight = next(iter(packed.values()))
    return NMSparseConfig(
        {names[name]: weight.pattern for name, weight in packed.items()},
        keep=any_weight.keep,
        group_dims={
            names[name]: weight.group_dim
            for name, weight in packed.items()
            if registry.get(names[name]) != weight.group_dim
        },
    )


def _names(argument: str, names: Iterable[str]) -> list[str]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"{argument} must be a list of names, got {names!r}")
    listed = list(names)
    if any(not isinstance(name, str) for name in listed):
        raise TypeError(f"{argument} must hold names, got {listed!r}")
    return listed


def _dims(dims: Mapping[str, int]) -> dict[str, int]:
    if not isinstance(dims, Mapping) or any(type(dim) is not int for dim in dims.values()):
        raise TypeError(f"group_dims must map names to dims, got {dims!r}")
    return dict(dims)
