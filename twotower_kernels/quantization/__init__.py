"""Weights in eight and four bits. Formula: `reference/quantization.py`; products: `ops/quantized.py`."""

from twotower_kernels.quantization.making import quantize
from twotower_kernels.quantization.weights import BITS, FORMATS, GROUP, QuantizedTensor

__all__ = ["BITS", "FORMATS", "GROUP", "QuantizedTensor", "quantize"]
