"""Quantize: a frozen base in 8 or 4 bits under adapters in full precision (QLoRA), any model."""

from rslora_jax.quantize.errors import error_table
from rslora_jax.quantize.weights import dequantize, quantize, quantize_weight
from rslora_jax.quantized import Quantized

__all__ = ["Quantized", "dequantize", "error_table", "quantize", "quantize_weight"]
