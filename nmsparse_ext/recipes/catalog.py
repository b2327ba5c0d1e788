"""The recipes by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from nmsparse_ext.recipes.config import TrainConfig
from nmsparse_ext.recipes.task import Task


@dataclass(frozen=True)
class Recipe:
    """Where a recipe is found; imported when it is used, since each needs libraries of its own.

    Attributes:
        name: Its name on the command line.
        summary: What it trains, in a line.
        module: Its module below `nmsparse_ext.recipes`.
        config_name: Its config class there.
        task_name: Its task class there.
    """

    name: str
    summary: str
    module: str
    config_name: str
    task_name: str

    @property
    def config(self) -> type[TrainConfig]:
        """Its config class."""
        return self._get(self.config_name)

    @property
    def task(self) -> Callable[[Any], Task]:
        """Its task class."""
        return self._get(self.task_name)

    def _get(self, attribute: str) -> Any:
        return getattr(import_module(f"nmsparse_ext.recipes.{self.module}"), attribute)


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "digits-resnet",
            "a small residual network on scikit-learn's digits",
            "digits_resnet",
            "DigitsConfig",
            "DigitsResnet",
        ),
        Recipe(
            "stdlib-gpt",
            "a small GPT on the Python standard library's source",
            "stdlib_gpt",
            "GptConfig",
            "StdlibGpt",
        ),
        Recipe(
            "imagenet-resnet",
            "a ResNet on a folder of images, by the published recipe",
            "imagenet_resnet",
            "ImagenetConfig",
            "ImagenetResnet",
        ),
        Recipe(
            "finetune-hf",
            "a transformers model from a local folder, on your own texts",
            "finetune_hf",
            "FinetuneConfig",
            "FinetuneHf",
        ),
    )
}
