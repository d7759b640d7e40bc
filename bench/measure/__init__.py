"""Clocks, ceilings of the machine, and the one way to time programs: checked first, then in turns."""
