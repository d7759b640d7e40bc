"""Benchmarks: `python -m bench`, installed `twotower bench`. They check before they time, and take turns."""

if __name__ == "bench":  # found beside the package, in a checkout: the same modules
    from twotower_kernels.short_names import shorten

    shorten(__name__)
