"""Where recipes/ and configs/ are."""

from pathlib import Path

# An installed wheel carries them inside the package; in a clone they stand beside it.
_PACKAGE = Path(__file__).parent
HOME = _PACKAGE / "_tune" if (_PACKAGE / "_tune").is_dir() else _PACKAGE.parent
