"""Whole diffusion language models on this library's operations, a page each, and the replay that judges them.

They read the originals' configurations and weights under the originals' names: `python -m examples.replay FOLDER`.
"""
