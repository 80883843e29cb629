"""A folder takes another's name, under which a whole folder is there at every moment."""

import ctypes
import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2
_REPLACED = ".replaced"


def replace_folder(new: Path, old: Path) -> None:
    """Gives ``new`` the name ``old``, and removes what had it. Both are in one file system.

    Linux exchanges the two names in one call. Network file systems may lack that call: there the old folder is renamed
    to ``NAME.replaced`` first, and a kill between the two renames leaves it under that name, from which
    :func:`restore_replaced` brings it back.

    Args:
        new (Path): a whole folder.
        old (Path): the name to take, in use or not.

    Raises:
        OSError: if it cannot be renamed; ``old`` is then as it was.
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
    """Gives the folders in ``folder`` that a kill has left as ``NAME.replaced`` their names back."""
    for replaced in folder.glob(f"*{_REPLACED}"):
        name = replaced.with_name(replaced.name.removesuffix(_REPLACED))
        if os.path.lexists(name):
            remove(replaced)
        else:
            with suppress(OSError):
                replaced.rename(name)


def remove(path: Path) -> None:
    """Removes a folder, as far as it can be; of a link to one, the link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one call; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))
