"""Humanline alignment (arXiv 2509.24207) as a torchtune recipe plug-in."""

from humanline import _torchao_names  # noqa: F401, completes torchao before torchtune is imported
from humanline._noise import hide_noise

__version__ = "0.1.0"

hide_noise()
