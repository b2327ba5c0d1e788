"""Models that a search can be asked for by name: recipes, factories, folders of transformers models."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from nmsparse_ext.recipes.task import Task

#: Tokens of the example input of a language model.
_TOKENS = 128


@dataclass
class Searched:
    """A model, and what else there is to search with.

    Attributes:
        model: The model.
        example_input: What it is called with; ``None`` if that is not known.
        step: ``step(model) -> loss`` on the next batch; ``None`` if it is not known how to train it.
        skip: What stays dense by default.
        inputs: Makes what the model is called with, batch after batch.
        made_up: Whether the example input is noise: good for shapes, and nothing to calibrate with.
    """

    model: nn.Module
    example_input: Any = None
    step: Callable[[nn.Module], Tensor] | None = None
    skip: list[str] = field(default_factory=list)
    inputs: Callable[[], Iterator[Any]] | None = None
    made_up: bool = False

    def calibration(self, batches: int) -> list[Any]:
        """Inputs of so many batches; of a model without data the example input alone.

        Raises:
            ValueError: If there is neither, or the example input is noise.
        """
        if self.inputs is not None:
            return list(itertools.islice(self.inputs(), batches))
        if self.example_input is None or self.made_up:
            raise ValueError(
                "there is no input to calibrate with: a recipe or a factory can bring one, and so can "
                "--calibration pkg.mod:function"
            )
        return [self.example_input]


def load_searched(name: str, arguments: Sequence[str], *, step: str | None = None) -> Searched:
    """Makes the model that ``name`` stands for.

    Args:
        name: A recipe; ``pkg.mod:factory``, a function that returns a model, or a model and an example input;
            or a folder with a model of transformers.
        arguments: Flags for the recipe.
        step: ``pkg.mod:function``, a function ``(model) -> loss``.

    Raises:
        ValueError: If there is no such thing, or flags come where there is no recipe.
        ModuleNotFoundError: If a library is missing.
    """
    from nmsparse_ext.recipes.catalog import RECIPES

    if name in RECIPES:
        found = _recipe(name, arguments)
    elif arguments:
        raise ValueError(f"{' '.join(arguments)}: only recipes take further flags")
    elif Path(name).is_dir():
        found = _transformers(Path(name))
    elif ":" in name:
        factory = imported(name)
        try:
            made = factory()
        except Exception as error:
            raise ValueError(f"{name} failed: {type(error).__name__}: {error}") from error
        model, example = made if isinstance(made, tuple) else (made, None)
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} must return an nn.Module, got {type(model).__name__}")
        found = Searched(model, example)
    else:
        raise ValueError(
            f"{name!r} is no recipe ({', '.join(RECIPES)}), no folder, and no factory like pkg.mod:function"
        )
    if step is not None:
        found.step = imported(step)
    return found


class RecipeStep:
    """``step(model) -> loss`` on a recipe's training data, batch after batch, epoch after epoch.

    Its state is where it is in the data, so that a search that is resumed goes on with the batch it would
    have come to.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._go_to(0, 0)

    def __call__(self, model: nn.Module) -> Tensor:
        """The loss of the next batch, with its graph."""
        batch = next(self._batches, None)
        if batch is None:
            self._go_to(self._epoch + 1, 0)
            batch = next(self._batches)
        self._index += 1
        return self._task.loss(model, batch)

    def state_dict(self) -> dict[str, int]:
        """Epoch, and how many of its batches have been used."""
        return {"epoch": self._epoch, "index": self._index}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes to where another one was."""
        self._go_to(state["epoch"], state["index"])

    def _go_to(self, epoch: int, index: int) -> None:
        from nmsparse_ext.recipes.task import Shard

        self._epoch, self._index = epoch, index
        self._batches = itertools.islice(self._task.train_batches(epoch, Shard()), index, None)


def _recipe(name: str, arguments: Sequence[str]) -> Searched:
    from nmsparse_ext.recipes.catalog import RECIPES
    from nmsparse_ext.recipes.config import parse_config
    from nmsparse_ext.recipes.loop import start_from
    from nmsparse_ext.recipes.runtime import seed_everything
    from nmsparse_ext.recipes.task import Place, Shard

    config = parse_config(RECIPES[name].config, arguments, name=name)
    task = RECIPES[name].task(config)
    seed_everything(config.seed, Place.WEIGHTS)
    model = task.build_model()
    if config.start is not None:
        start_from(model, config.start)

    def batches() -> Iterator[Any]:
        return itertools.chain.from_iterable(
            task.train_batches(epoch, Shard()) for epoch in itertools.count()
        )

    return Searched(
        model,
        example_input=task.model_input(next(batches())),
        step=RecipeStep(task),
        skip=list(task.dense_layers(model)) if config.skip is None else config.skip,
        inputs=lambda: map(task.model_input, batches()),
    )


def _transformers(folder: Path) -> Searched:
    import transformers

    # Code in the folder is not run, and nobody is asked whether it should be.
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    names = getattr(config, "architectures", None) or ["AutoModel"]
    kind: Any = getattr(transformers, str(names[0]), None)
    if not hasattr(kind, "from_pretrained"):
        raise ValueError(f"{folder}: transformers has no model {names[0]!r}")
    model = kind.from_pretrained(folder, local_files_only=True, dtype="auto").eval()
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "input_ids":
        example = {"input_ids": torch.randint(config.vocab_size, (1, _TOKENS), generator=generator)}
    elif model.main_input_name == "pixel_values":
        side = getattr(config, "image_size", 224)
        image = torch.randn(1, getattr(config, "num_channels", 3), side, side, generator=generator)
        example = {"pixel_values": image.to(model.dtype)}
    else:
        return Searched(model)
    return Searched(model, example, made_up=True)


def imported(name: str) -> Callable[..., Any]:
    """The function that ``pkg.mod:function`` names; modules in the current folder are found, too.

    Raises:
        ValueError: If it does not look like that, or the module has no such function.
        ModuleNotFoundError: If there is no such module.
    """
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise ValueError(f"{name!r} must look like package.module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules that lie where the command is given
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # somebody's code: whatever it raises
        raise ValueError(f"{module} cannot be imported: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ValueError(f"{module} has no function {attribute}")
    return found
