"""Quantities as a reader has them: three digits and a unit."""


def duration(seconds: float) -> str:
    """A duration: "12.3 ms", "1.5 s"."""
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def size(number: int) -> str:
    """Bytes, in powers of 1000: "64.1 GB"."""
    value, units = float(number), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"
