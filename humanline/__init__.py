"""Humanline alignment (arXiv 2509.24207) as a torchtune recipe plug-in."""

__version__ = "0.1.0"
