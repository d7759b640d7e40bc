"""What a caller may ask for, as data: policies, a model's configuration, a generation's arguments, and their checks.

No arithmetic on tensors lives here, so the specification (`reference/`) and the kernels read the same options, and
still judge each other's results.
"""
