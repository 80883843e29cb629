"""Gemma 2 as published: torchtune's implementation with its faults corrected."""

from humanline.models.gemma2._builders import (
    gemma2,
    gemma2_2b,
    gemma2_9b,
    gemma2_27b,
    lora_gemma2,
    lora_gemma2_2b,
    lora_gemma2_9b,
    lora_gemma2_27b,
    qlora_gemma2_2b,
    qlora_gemma2_9b,
    qlora_gemma2_27b,
)
from humanline.models.gemma2._mend import name_norms

__all__ = [
    "gemma2",
    "gemma2_2b",
    "gemma2_9b",
    "gemma2_27b",
    "lora_gemma2",
    "lora_gemma2_2b",
    "lora_gemma2_9b",
    "lora_gemma2_27b",
    "qlora_gemma2_2b",
    "qlora_gemma2_9b",
    "qlora_gemma2_27b",
]

name_norms()  # at import, since a checkpoint may be read before a model is built
