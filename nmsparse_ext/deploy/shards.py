"""A model over several safetensors files, with an index that says which tensor is in which.

Names are Hugging Face's: ``model-00001-of-00003.safetensors`` and ``model.safetensors.index.json``. Each
shard is a file of the format on its own; both tensors of a packed weight are in the same one.

How a save stays all or nothing: shards never overwrite one another (where a name is taken, the new ones get
eight random hex digits more), the index is replaced in one step when all of them are on the disk, and only
then does what it no longer names go. A single file takes precedence over an index beside it, as it does for
``transformers``; so the step that counts is one rename or one unlink, whichever kind follows which.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file as write_safetensors
from torch import Tensor

from .._atomic import atomic_write, check_place, sync_folder
from ..errors import FormatError
from .format import INDICES, VALUES, Contents, brief, parse_metadata, strict_json
from .stored import aligned

INDEX_SUFFIX = ".index.json"
EXTENSION = ".safetensors"
_SIZE = re.compile(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([KMGT]?)(i?)B\s*", re.IGNORECASE)


def parse_size(size: int | str, argument: str = "max_shard_size") -> int:
    """Returns a number of bytes: ``"5GB"`` is 5 * 10^9, ``"5GiB"`` 5 * 2^30.

    Raises:
        TypeError: If ``size`` is neither an int nor text.
        ValueError: If it is no positive size.
    """
    if isinstance(size, str):
        found = _SIZE.fullmatch(size)
        if found is None:
            raise ValueError(f'{argument} must look like "5GB" or "500MiB", got {size!r}')
        number, unit, binary = found.groups()
        base = 1024 if binary else 1000
        size = int(float(number) * base ** ("KMGT".index(unit.upper()) + 1 if unit else 0))
    elif isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f'{argument} must be a number of bytes or text such as "5GB", got {size!r}')
    if size < 1:
        raise ValueError(f"{argument} must be at least one byte, got {size}")
    return size


# ---------------------------------------------------------------------------------------------------- writing


def write_model(path: str, stored: dict[str, Tensor], contents: Contents, limit: int | None) -> None:
    """Writes a model as one file, or as shards of at most ``limit`` bytes of tensors if it is larger.

    Whatever of the model was at ``path`` before is replaced, be it one file or shards.

    Raises:
        ValueError: If shards are wanted of a file whose name does not end in ``.safetensors``.
        OSError: If something cannot be written; the old model is still there.
    """
    if limit is not None and not path.endswith(EXTENSION):
        raise ValueError(f"path must end in {EXTENSION} for a model in shards, got {path!r}")
    check_place(path)
    shards = [list(stored)] if limit is None else split(stored, contents, limit)
    if len(shards) > 1:
        _write_shards(path, [{name: stored[name] for name in shard} for shard in shards], contents)
        return
    with atomic_write(path) as file:
        write_safetensors(stored, file.name, contents.to_metadata())
    if path.endswith(EXTENSION):
        # The new file counts already; an index beside it would only be in the way of its deletion.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + INDEX_SUFFIX)
            _clean(path, keep=())


def split(stored: Mapping[str, Tensor], contents: Contents, limit: int) -> list[list[str]]:
    """Distributes tensors over shards of at most ``limit`` bytes, in their order.

    What belongs to one weight stays together; a weight that is larger than the limit has a shard of its own.
    """
    shards: list[list[str]] = [[]]
    used = 0
    packed = {name + suffix: name for name in contents.weights for suffix in (VALUES, INDICES)}
    units: dict[str, list[str]] = {}
    for name in stored:
        units.setdefault(packed.get(name, name), []).append(name)
    for names in units.values():
        size = sum(stored[name].nbytes for name in names)
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1] += names
        used += size
    return shards


def _write_shards(path: str, shards: list[dict[str, Tensor]], contents: Contents) -> None:
    folder, base = os.path.split(path)
    stem = base.removesuffix(EXTENSION)
    names = _free_names(folder, stem, len(shards))
    written: list[str] = []
    # A folder for what is half written: safetensors makes files of names of its own on the way.
    staging = os.path.join(folder, f".{stem}.{secrets.token_hex(8)}.tmp")
    try:
        os.mkdir(staging)
        for name, tensors in zip(names, shards, strict=True):
            with atomic_write(os.path.join(staging, name)) as file:
                write_safetensors(tensors, file.name, contents.of(tensors).to_metadata())
            written.append(os.path.join(folder, name))
            os.replace(os.path.join(staging, name), written[-1])
        sync_folder(folder)
        index = {
            "metadata": {"total_size": sum(t.nbytes for tensors in shards for t in tensors.values())},
            "weight_map": {
                tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors
            },
        }
        with atomic_write(path + INDEX_SUFFIX) as file:
            file.write(json.dumps(index, indent=2, ensure_ascii=False).encode())
            file.flush()
    except BaseException:
        for shard in written:
            with contextlib.suppress(OSError):
                os.unlink(shard)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # an older model in one file, which would take precedence
        sync_folder(folder)
    _clean(path, keep=names)


def _free_names(folder: str, stem: str, count: int) -> list[str]:
    """Names for shards that no file has."""
    token = ""
    while True:
        names = [f"{stem}{token}-{i + 1:05d}-of-{count:05d}{EXTENSION}" for i in range(count)]
        if not any(os.path.lexists(os.path.join(folder, name)) for name in names):
            return names
        token = f"-{secrets.token_hex(4)}"


def _clean(path: str, keep: Iterable[str]) -> None:
    """Deletes shards of the model at ``path`` that are not to be kept, and half-written ones."""
    folder, base = os.path.split(path)
    stem = re.escape(base.removesuffix(EXTENSION))
    shard = rf"{stem}(-[0-9a-f]{{8}})?-[0-9]{{5,}}-of-[0-9]{{5,}}{re.escape(EXTENSION)}"
    staging = re.compile(rf"\.{stem}\.[0-9a-f]{{16}}\.tmp")
    kept = set(keep)
    with contextlib.suppress(OSError):  # the model is saved; what is left over does no harm
        for name in os.listdir(folder or "."):
            if staging.fullmatch(name):
                shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
            elif name not in kept and re.fullmatch(shard, name):
                os.unlink(os.path.join(folder, name))


# ---------------------------------------------------------------------------------------------------- reading


def locate(path: str) -> str:
    """Returns the file to begin with: a safetensors file, or an index.

    Args:
        path: A file, an index, a folder that holds either, or the path that shards were saved under.

    Raises:
        FormatError: If the folder holds several models and none called ``model.safetensors``.
        FileNotFoundError: If there is none.
    """
    if os.path.isdir(path):
        for name in ("model" + EXTENSION, "model" + EXTENSION + INDEX_SUFFIX):
            if os.path.isfile(os.path.join(path, name)):
                return os.path.join(path, name)
        names = sorted(os.listdir(path))
        found = [name for name in names if name.endswith(EXTENSION + INDEX_SUFFIX)]
        found = found or [name for name in names if name.endswith(EXTENSION)]
        if not found:
            raise FileNotFoundError(f"{path} holds no *{EXTENSION} and no *{EXTENSION}{INDEX_SUFFIX}")
        if len(found) > 1:
            raise FormatError(f"{path} holds several models, name one: {brief(found)}")
        return os.path.join(path, found[0])
    if not os.path.exists(path) and os.path.isfile(path + INDEX_SUFFIX):
        return path + INDEX_SUFFIX
    return path


def read_stored(path: str) -> tuple[dict[str, Tensor], Contents]:
    """Maps the tensors of a model, of one file or of shards, and reads what they mean.

    Args:
        path: What `locate` has returned.

    Raises:
        FormatError: If a file, or the index, is not what it claims to be.
        OSError: If ``path`` cannot be opened.
    """
    if not path.endswith(INDEX_SUFFIX):
        with open(path, "rb"):  # so that a missing or forbidden file is an OSError, and no format error
            pass
        return _read_file(path)
    while True:
        index = _read_bytes(path)
        shards = parse_index(index)
        try:
            return _read_shards(os.path.dirname(path), shards)
        except FileNotFoundError as error:
            # Somebody may have saved in the meantime, and cleaned up; then there is another index.
            if _read_bytes(path) == index:
                name = os.path.basename(str(error.filename))
                raise FormatError(f"the index names {name!r}, which does not exist") from None


def _read_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def parse_index(content: bytes) -> dict[str, list[str]]:
    """Reads an index: ``{shard: names of its tensors}``.

    Raises:
        FormatError: If it is no index, or a shard's name is more than a name.
    """
    index = strict_json("the index", content)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("an index must have an object 'weight_map' with an entry for each tensor")
    shards: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        # Nothing outside of the index's own folder, on any system, and nothing that is no tensor file.
        if (
            not isinstance(shard, str)
            or not shard.endswith(EXTENSION)
            or shard.startswith(".")
            or any(char in shard for char in "/\\:\0")
        ):
            raise FormatError(f"tensor {tensor!r}: {brief(shard)} is no name of a shard beside the index")
        shards.setdefault(shard, []).append(tensor)
    return shards


def _read_shards(folder: str, shards: Mapping[str, list[str]]) -> tuple[dict[str, Tensor], Contents]:
    stored: dict[str, Tensor] = {}
    contents = Contents()
    for shard, names in shards.items():
        path = os.path.join(folder, shard)
        if os.path.isdir(path):
            raise FormatError(f"the index names {shard!r}, which is a folder")
        with open(path, "rb"):  # so that what cannot be opened is an OSError
            pass
        try:
            tensors, described = _read_file(path)
            contents.add(described)
        except FormatError as error:
            raise FormatError(f"shard {shard!r}: {error}") from None
        if tensors.keys() != set(names):
            missing, unknown = sorted(set(names) - tensors.keys()), sorted(tensors.keys() - set(names))
            raise FormatError(
                f"shard {shard!r}: the index names tensors that it lacks {brief(missing)}, and it has "
                f"tensors that the index does not place there {brief(unknown)}"
            )
        stored |= tensors
    return stored, contents


def _read_file(path: str) -> tuple[dict[str, Tensor], Contents]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            contents = parse_metadata(file.metadata())
            names = file.keys()
            return {name: aligned(file.get_tensor(name)) for name in names}, contents
    except FormatError:
        raise
    except Exception as error:
        # Whatever safetensors or PyTorch find wrong with tensors that the header describes.
        raise FormatError(f"no valid safetensors file: {error}") from error


def read_config(folder: str) -> dict[str, Any]:
    """The ``config.json`` of a folder; empty if there is none.

    Raises:
        FormatError: If it is no JSON object.
    """
    try:
        content = _read_bytes(os.path.join(folder, "config.json"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    config = strict_json("config.json", content)
    if not isinstance(config, dict):
        raise FormatError(f"config.json must be an object, got {brief(config)}")
    return config
