"""What MODEL and FILE arguments stand for: tensors, or a model that holds them.

- ``m.safetensors``, ``m.safetensors.index.json`` (with its shards), a folder with one of them; ``m.pt``,
  ``m.pth``, ``m.bin`` with a state dict: tensors, or a `TensorModel`, which has weights and no forward;
- the folder of a ``transformers`` model: that model, with an example input of random tokens or pixels;
- ``pkg.mod:factory``: the model that it returns, alone or as a tuple with an example input.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from nmsparse_ext.recipes.searched import Searched

INDEX = ".index.json"
PICKLES = (".pt", ".pth", ".bin")


class Kind(str, Enum):
    """What an argument stands for."""

    FILE = "file"
    INDEX = "index"
    PICKLE = "pickle"
    TRANSFORMERS = "transformers"
    FACTORY = "factory"
    RECIPE = "recipe"


def kind_of(argument: str | os.PathLike[str]) -> Kind:
    """What an argument stands for; nothing is read.

    Raises:
        FileNotFoundError: If it is no file and no folder, and does not look like ``pkg.mod:function``.
        ValueError: If it is a folder in which nothing is recognised.
    """
    text = os.fspath(argument)
    path = Path(text)
    if path.is_dir():
        if (path / "config.json").exists():
            return Kind.TRANSFORMERS
        return kind_of(tensor_file(path))
    if path.exists():
        if text.endswith(INDEX):
            return Kind.INDEX
        return Kind.PICKLE if path.suffix in PICKLES else Kind.FILE
    if Path(text + INDEX).exists():  # what a model in shards was saved as
        return Kind.INDEX
    from nmsparse_ext.recipes.catalog import RECIPES

    if text in RECIPES:
        return Kind.RECIPE
    if ":" in text and os.sep not in text:
        return Kind.FACTORY
    raise FileNotFoundError(
        f"{text!r} is no recipe ({', '.join(RECIPES)}), no file, no folder, and no factory like "
        "pkg.mod:function"
    )


def tensor_file(folder: Path) -> Path:
    """The file, or the index of the files, that holds a folder's tensors.

    Raises:
        FormatError: If several could be meant.
        FileNotFoundError: If there is none.
    """
    from nmsparse_ext.deploy.shards import locate

    pickled = folder / "pytorch_model.bin"
    try:
        return Path(locate(os.fspath(folder)))
    except FileNotFoundError:
        if pickled.exists():
            return pickled
        raise FileNotFoundError(f"{folder} holds no safetensors file and no config.json") from None


def load_tensors(argument: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors that an argument stands for: `NMTensor` where they are packed; those of files are mapped.

    Raises:
        FormatError: If a file is not what it claims to be.
        ValueError: If the argument stands for nothing that has tensors.
        OSError: If something cannot be read.
    """
    kind, path = kind_of(argument), Path(argument)
    if kind in (Kind.FACTORY, Kind.RECIPE):
        return dict(load_model(os.fspath(argument)).model.state_dict(keep_vars=True))
    if path.is_dir():
        path = tensor_file(path)
    if path.suffix in PICKLES:
        return _unpickled(path)
    import nmsparse_ext as nms

    return nms.load_file(path)


def load_model(argument: str, flags: Sequence[str] = (), *, step: str | None = None) -> Searched:
    """The model that an argument stands for, and what is known of its inputs.

    Args:
        argument: See above, or the name of a recipe.
        flags: For a recipe.
        step: ``pkg.mod:function``, which takes the model and returns a loss.

    Returns:
        The model, in ``.model``; ``.example_input`` is ``None`` where it is not known. A model made of a
        file's tensors is a `TensorModel`, in which weights are found but which cannot be called like the
        model they come from.

    Raises:
        ValueError: If the argument stands for nothing that has weights, or a factory fails.
        OSError: If something cannot be read.
    """
    kind = kind_of(argument)
    if kind in (Kind.TRANSFORMERS, Kind.FACTORY, Kind.RECIPE):
        from nmsparse_ext.recipes.searched import load_searched

        _know_packed()
        quiet = quiet_transformers() if kind is Kind.TRANSFORMERS else nullcontext()
        with quiet:
            return load_searched(argument, flags, step=step)
    if flags:
        raise ValueError(f"{' '.join(flags)}: only recipes take further flags")
    from nmsparse_ext.cli.tensor_model import TensorModel
    from nmsparse_ext.recipes.searched import Searched, imported

    return Searched(TensorModel(load_tensors(argument)), step=None if step is None else imported(step))


def calibration_batches(found: Searched, argument: str, function: str, batches: int) -> list[Any]:
    """At most so many batches of ``pkg.mod:function``, for a model that can be called with them.

    Raises:
        ValueError: If the model is a file's tensors, or there is no such function.
    """
    from nmsparse_ext.cli.tensor_model import TensorModel
    from nmsparse_ext.recipes.searched import imported

    if isinstance(found.model, TensorModel):
        raise ValueError(
            f"--calibration: {argument} is a file, and nobody knows how its layers are called: give the "
            "model, as pkg.mod:factory or transformers folder"
        )
    return list(itertools.islice(imported(function)(), batches))


def chosen(name: str, layers: Sequence[str] | None, skip: Sequence[str] | None) -> bool:
    """Whether ``--layers`` and ``--skip`` choose a tensor, by its name or that of a module above it."""
    parts = name.split(".")
    paths = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]

    def match(globs: Sequence[str]) -> bool:
        return any(fnmatchcase(path, glob) for path in paths for glob in globs)

    return (not layers or match(layers)) and not match(skip or ())


def _know_packed() -> None:
    """Has `torch.load` know packed tensors: in this command nmsparse_ext does not import them at once."""
    import nmsparse_ext.tensor  # noqa: F401


def _unpickled(path: Path) -> dict[str, Tensor]:
    import torch

    import nmsparse_ext as nms

    _know_packed()
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # What torch says has lines of advice to load it without any check, which we do not pass on.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise nms.FormatError(f"{path}: no file of tensors alone: {reason}") from None
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise nms.FormatError(f"{path}: it holds a {type(content).__name__}, and no state dict")
    return {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Its progress bars, too, are for terminals only."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
