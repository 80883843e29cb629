from importlib.util import find_spec

PIP_NAMES = {
    "PIL": "pillow",
    "attr": "attrs",
    "cv2": "opencv-python",
    "dateutil": "python-dateutil",
    "google": "protobuf",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
"""Modules whose package has another name for pip, with that name."""


def missing_package(error: BaseException | None) -> str | None:
    """Returns the package that an error reports as not installed, with the pip command; None for any other error."""
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = (error.__cause__ or error.__context__) if isinstance(error, ImportError) else None
    module = (error.name or "").partition(".")[0] if error is not None else ""
    if not module or find_spec(module) is not None:  # the package is installed, but a module of it is missing
        return None
    name = PIP_NAMES.get(module, module.replace("_", "-"))
    return f"the package {name} is not installed; install it: pip install {name}"
