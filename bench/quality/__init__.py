"""How good the shipped model's text is, mode by mode, on files held out of its training: `python -m bench.quality`."""
