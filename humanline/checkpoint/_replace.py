"""Replaces a folder by another one, so that a complete folder has the name at every moment."""

import ctypes
import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2
_REPLACED = ".replaced"


def replace_folder(new: Path, old: Path) -> None:
    """Renames ``new`` to ``old``, and removes the folder that had that name. Both must be in one file system.

    Linux exchanges the two names in one call. Network file systems may lack that call. There the old folder is first
    renamed to ``NAME.replaced``. A kill between the two renames leaves it there, and :func:`restore_replaced` renames
    it back.

    Args:
        new (Path): a complete folder.
        old (Path): the new name, in use or not.

    Raises:
        OSError: if a rename fails. ``old`` is then unchanged.
    """
    removed = new
    if not os.path.lexists(old):
        new.rename(old)
        return
    if not _exchange(new, old):
        removed = old.with_name(old.name + _REPLACED)
        remove(removed)
        old.rename(removed)
        try:
            new.rename(old)
        except OSError:
            removed.rename(old)
            raise
    remove(removed)


def restore_replaced(folder: Path) -> None:
    """Renames folders that a kill left as ``NAME.replaced`` back to ``NAME``, or removes them if ``NAME`` exists."""
    for replaced in folder.glob(f"*{_REPLACED}"):
        name = replaced.with_name(replaced.name.removesuffix(_REPLACED))
        if os.path.lexists(name):
            remove(replaced)
        else:
            with suppress(OSError):
                replaced.rename(name)


def remove(path: Path) -> None:
    """Removes a folder as far as possible, or a link to a folder."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one call. Returns False if the system or the file system cannot do this."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))
