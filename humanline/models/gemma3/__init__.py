"""The text model of Gemma 3, which torchtune does not have."""

from humanline.models.gemma3._attention import Gemma3Attention
from humanline.models.gemma3._builders import (
    gemma3,
    gemma3_1b,
    gemma3_4b,
    gemma3_12b,
    gemma3_27b,
    gemma3_270m,
    lora_gemma3,
    lora_gemma3_1b,
    lora_gemma3_4b,
    lora_gemma3_12b,
    lora_gemma3_27b,
    lora_gemma3_270m,
    qlora_gemma3_1b,
    qlora_gemma3_4b,
    qlora_gemma3_12b,
    qlora_gemma3_27b,
    qlora_gemma3_270m,
)

__all__ = [
    "Gemma3Attention",
    "gemma3",
    "gemma3_270m",
    "gemma3_1b",
    "gemma3_4b",
    "gemma3_12b",
    "gemma3_27b",
    "lora_gemma3",
    "lora_gemma3_270m",
    "lora_gemma3_1b",
    "lora_gemma3_4b",
    "lora_gemma3_12b",
    "lora_gemma3_27b",
    "qlora_gemma3_270m",
    "qlora_gemma3_1b",
    "qlora_gemma3_4b",
    "qlora_gemma3_12b",
    "qlora_gemma3_27b",
]
