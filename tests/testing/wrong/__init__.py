"""Wrong kernels: what `twotower_kernels.testing.check` must find.

A class is a right program of `tests/testing/plain` with one step replaced, a function calls the public op and spoils
what it gives or is given. Each says in its first line what is wrong with it.
"""
