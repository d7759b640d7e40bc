"""Generation by blocks for any model that proposes logits for masks: the loop, its events and its results.

It knows prompts, rows, steps and policies, and no model: a model is a `Context` (`blocks.py`), or for a caller a
function of tokens (`generate_blocks.py`).
"""

from twotower_kernels.generation.generate_blocks import generate_blocks, stream_blocks
from twotower_kernels.generation.results import GenerateResult, StepEvent
from twotower_kernels.generation.stream import Stream

__all__ = ["GenerateResult", "StepEvent", "Stream", "generate_blocks", "stream_blocks"]
