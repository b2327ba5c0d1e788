"""Writing transformers models as folders, complete or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmsparse_ext.cli.sources import quiet_transformers

if TYPE_CHECKING:
    from torch import nn

#: What belongs to the weights of a folder, and is not copied beside new ones.
_WEIGHTS = (
    "*.safetensors",
    "*.index.json",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.h5",
    "*.msgpack",
    "*.gguf",
    "*.onnx",
)


def save_transformers(model: nn.Module, source: Path, out: Path, max_shard_size: str | None) -> None:
    """Writes a model with its config by ``save_pretrained``, and copies what else lies beside it.

    Those are the tokenizer, the generation config, and so on; not what lies in folders of ``source``.

    Args:
        model: A model of transformers.
        source: The folder that it came from.
        out: The folder to write, in one step; replaced if it exists.
        max_shard_size: As transformers takes it; ``None`` for its own choice.
    """
    saved: Any = model
    options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    with atomic_folder(out) as folder, quiet_transformers():
        for path in source.iterdir():
            if path.is_file() and not any(path.match(glob) for glob in _WEIGHTS):
                shutil.copyfile(path, folder / path.name)
        saved.save_pretrained(folder, **options)


def check_replaceable(path: Path) -> None:
    """Refuses a folder that is not to be replaced as a whole, whatever the user says.

    Raises:
        ValueError: If it holds files and is no model's, holds other folders, or is the current one.
    """
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} holds files and no config.json: it is no model's folder, and not replaced")
    inside = [entry.name for entry in path.iterdir() if entry.is_dir()]
    if inside:
        raise ValueError(f"{path} holds folders ({', '.join(sorted(inside)[:3])}), which would be lost")
    if path.samefile(Path.cwd()):
        raise ValueError(f"{path} is the current folder, and not replaced")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``path`` when the block ends without an error.

    An older folder is moved aside first, because a folder cannot be renamed over one that has something in
    it; it is deleted when the new one is in its place, and moved back if that fails. A symbolic link stays
    one, and its target is replaced.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.old")
            path.rename(aside)
            try:
                temporary.rename(path)
            except BaseException:
                aside.rename(path)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary)
        raise
