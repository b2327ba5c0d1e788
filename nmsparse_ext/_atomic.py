"""Writing a file so that a reader, or a crash, never meets half of it."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from typing import BinaryIO

from ._arguments import check_path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a new file for writing, which takes the place of ``path`` when the block ends without an error.

    The bytes are on the disk before the name is: the file is synced, then renamed over ``path``, then the
    folder is synced. A symbolic link stays one, and its target is replaced. The block may write to the file,
    or hand its ``name`` to a library that writes, or replaces, the file of that name.

    Raises:
        FileNotFoundError: If the folder of ``path`` does not exist.
        IsADirectoryError: If ``path`` is a folder.
        OSError: If it cannot be written for another reason; the old file is still there.
    """
    check_place(path)  # the errors below would speak of a temporary file
    target = os.path.realpath(os.fspath(path))
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(8)}.tmp")
    try:
        # "x" and not the tempfile module: that one creates files that nobody else may read, whatever the
        # umask says.
        with open(temporary, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            yield file
        # By name: a library that was given the name may have put another file in the place of ours.
        with open(temporary, "rb+") as written:
            os.chmod(temporary, mode)
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(folder)


def check_place(path: str | os.PathLike[str]) -> None:
    """Refuses a path that no file can be written to, before anything is.

    Raises:
        FileNotFoundError: If the folder of ``path`` does not exist.
        IsADirectoryError: If ``path`` is a folder.
    """
    given = check_path("path", path)
    target = os.path.realpath(given)
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, f"cannot be written, as there is no folder {folder}", given)
    if os.path.isdir(target):
        raise IsADirectoryError(errno.EISDIR, "is a folder; give the name of the file to write", given)


def sync_folder(folder: str) -> None:
    """Has the names in a folder on the disk, where folders can be synced; ``""`` is the current one."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
