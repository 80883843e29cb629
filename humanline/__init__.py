"""Humanline alignment (arXiv 2509.24207) as a torchtune recipe plug-in."""

from humanline._noise import hide_noise
from humanline.torchtune_seam import torchao_names  # noqa: F401, completes torchao before torchtune is imported

__version__ = "0.1.0"

hide_noise()
