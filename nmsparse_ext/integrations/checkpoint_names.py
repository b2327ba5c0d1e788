"""What weights are called in the files and the configs that `transformers` writes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ..deploy.format import INDICES, VALUES, PackedEntry, parse_metadata
from ..errors import FormatError
from ..pattern import Pattern
from ..weights import Weight


def read_entries(scheme: Mapping[str, str], files: Iterable[str]) -> dict[str, PackedEntry]:
    """What the files say of each packed weight, under the names that they have there.

    Raises:
        FormatError: Unless the config and the files agree on how many weights have which pattern; names may
            differ.
    """
    packed: dict[str, PackedEntry] = {}
    for path in files:
        if not os.fspath(path).endswith(".safetensors"):
            continue
        with safe_open(path, framework="pt") as file:
            contents = parse_metadata(file.metadata())
        packed |= contents.weights
    stored = Counter(str(entry.pattern) for entry in packed.values())
    if packed and stored != Counter(scheme.values()):
        raise FormatError(
            f"config.json says that {dict(Counter(scheme.values()))} weights are packed, the files say "
            f"{dict(stored)}"
        )
    return packed


def check_entry(name: str, entry: PackedEntry, pattern: Pattern, group_dim: int | None) -> None:
    """Raises unless a file says of a weight what the config says of it."""
    if (entry.pattern, entry.group_dim) != (pattern, group_dim):
        raise FormatError(
            f"{name}: config.json says {pattern} along dim {group_dim}, the file says {entry.pattern} along "
            f"dim {entry.group_dim}"
        )


def names_in(model: Any, table: Mapping[str, Any], known: Mapping[str, Weight]) -> dict[str, Any]:
    """The entries that this class of model has; those of heads that it lacks are left out.

    A checkpoint of a model with a head may be loaded without the head, and the other way round: names differ
    by the base model's prefix then.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = {}
    for name, value in table.items():
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in known:
                found[candidate] = value
                break
    return found


def file_names(model: Any, stored: dict[str, Tensor], packed: Iterable[str]) -> dict[str, str]:
    """What `transformers` will call each tensor in the file: it renames some to what older versions wrote.

    Where it would also change what is in them (experts that are one weight in the model are many in the
    file), packed ones are exempted.
    """
    from transformers.core_model_loading import WeightConverter, revert_weight_conversion

    parts = [name + suffix for name in packed for suffix in (VALUES, INDICES)]
    conversions = getattr(model, "_weight_conversions", None)
    names = _matched(stored, revert_weight_conversion(model, dict(stored)))
    if any(name not in names for name in parts):
        if conversions is None:
            from transformers.conversion_mapping import get_model_conversion_mapping

            conversions = get_model_conversion_mapping(model, add_legacy=False)
        model._weight_conversions = [
            conversion
            for conversion in conversions
            if not isinstance(conversion, WeightConverter)
            or not any(conversion.reverse_transform().rename_source_key(name)[1] for name in parts)
        ]
        names = _matched(stored, revert_weight_conversion(model, dict(stored)))
    changed = [name for name in parts if name not in names]
    if changed:
        raise ValueError(f"transformers would convert the contents of {', '.join(changed)} in the file")
    return names


def _matched(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, str]:
    """Old name -> new name of what are the same tensors."""
    new = {id(tensor): name for name, tensor in after.items()}
    return {name: new[id(tensor)] for name, tensor in before.items() if id(tensor) in new}
