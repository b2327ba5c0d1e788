"""Images in folders, one folder a class: read with Pillow, augmented reproducibly."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nmsparse_ext.recipes.task import Place, seed_for

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm"}

# Of ImageNet's training images, as everybody uses them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Sample = tuple[Path, int]


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied.

    Attributes:
        size: Height and width of what the model sees.
        scale: Smallest and largest share of the image's area in a crop.
        ratio: Smallest and largest width over height of a crop.
        colour: How far brightness, contrast and saturation move, each by a factor 1 - colour to 1 + colour.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    colour: float = 0.2

    def __call__(self, image: Image.Image, draw: random.Random) -> Image.Image:
        """A random crop, resized; flipped half of the time; other colours."""
        box = self._crop(*image.size, draw)
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box, reducing_gap=3.0)
        if draw.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.colour:
            for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                image = enhance(image).enhance(draw.uniform(1 - self.colour, 1 + self.colour))
        return image

    def _crop(self, width: int, height: int, draw: random.Random) -> tuple[float, float, float, float]:
        """A crop of random area and shape; the largest one in the middle if ten draws do not fit."""
        for _ in range(10):
            area = width * height * draw.uniform(*self.scale)
            ratio = math.exp(draw.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = draw.randint(0, width - w), draw.randint(0, height - h)
                return left, top, left + w, top + h
        widest, highest = min(width, height * self.ratio[1]), min(height, width / self.ratio[0])
        margin, above = (width - widest) / 2, (height - highest) / 2
        return margin, above, margin + widest, above + highest


def centre_crop(image: Image.Image, size: int, resize: int) -> Image.Image:
    """The middle of the image, `size` x `size`, after its shorter side has become `resize`."""
    width, height = image.size
    side = min(width, height) * size / resize
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=3.0)


def to_tensor(image: Image.Image) -> Tensor:
    """Float32 [3, height, width], each channel with ImageNet's mean 0 and standard deviation 1."""
    pixels = torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


# ------------------------------------------------------------------------------------------------- folders


def find_images(folder: Path, classes: Sequence[str] | None = None) -> tuple[list[str], list[Sample]]:
    """The images below a folder of class folders.

    Args:
        folder: The folder.
        classes: The classes there are; by default the class folders, in order of their names.

    Returns:
        The classes, and ``(path, class number)`` of every image, sorted.

    Raises:
        ValueError: If there are no images, or those of a class that is none of `classes`.
    """
    if not folder.is_dir():
        raise ValueError(f"data: there is no folder {folder}")
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    known = list(classes) if classes is not None else found
    if strangers := sorted(set(found) - set(known)):
        raise ValueError(
            f"data: {folder} has classes that the training data lack: {', '.join(strangers[:5])}"
        )
    number = {name: i for i, name in enumerate(known)}
    samples = [
        (path, number[name])
        for name in found
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not samples:
        raise ValueError(f"data: {folder} holds no images in class folders")
    return known, samples


def hold_out(samples: list[Sample], share: float) -> tuple[list[Sample], list[Sample]]:
    """Parts the samples of every class in two, by a hash of the file names: the same ones in every run.

    Returns:
        What is left, and what is held out: `share` of each class, at least one image.
    """
    by_class: dict[int, list[Sample]] = {}
    for sample in samples:
        by_class.setdefault(sample[1], []).append(sample)
    left, held = [], []
    for of_class in by_class.values():
        ranked = sorted(of_class, key=lambda sample: hashlib.sha256(sample[0].name.encode()).digest())
        count = max(1, round(share * len(ranked)))
        held += ranked[:count]
        left += ranked[count:]
    return sorted(left), sorted(held)


# ------------------------------------------------------------------------------------------------- loading


@dataclass
class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images by number, as a DataLoader's workers read them.

    Attributes:
        samples: Path and class of every image.
        size: Height and width of what the model sees.
        resize: Of evaluation: what the shorter side becomes before the middle is cut out.
        augmentation: How images are varied; ``None`` for evaluation.
        seed: Seed of the run.
        epoch: The epoch: an image is varied in the same way whoever reads it.
    """

    samples: list[Sample]
    size: int
    resize: int
    augmentation: Augmentation | None = None
    seed: int = 0
    epoch: int = field(default=0)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        with Image.open(path) as file:
            image = file.convert("RGB")
        if self.augmentation is None:
            return to_tensor(centre_crop(image, self.size, self.resize)), label
        draw = random.Random(seed_for(self.seed, Place.AUGMENTATION, self.epoch, index))
        return to_tensor(self.augmentation(image, draw)), label


def read_batches(
    images: ImageFolder, batches: list[list[int]], workers: int, pinned: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images [count, 3, size, size] and labels [count], read by worker processes."""
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pinned,
        # What is drawn here would else come from the global generator, which dropout uses.
        generator=torch.Generator().manual_seed(0),
    )
    for x, y in loader:
        yield x.contiguous(memory_format=torch.channels_last), y
