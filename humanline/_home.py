"""The folder that holds recipes/ and configs/."""

from pathlib import Path

# An installed wheel has them inside the package, a clone beside it.
_PACKAGE = Path(__file__).parent
HOME = _PACKAGE / "_tune" if (_PACKAGE / "_tune").is_dir() else _PACKAGE.parent
