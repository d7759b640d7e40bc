"""What is tried of each op: a file per family, in which strategies draw its inputs."""

from twotower_kernels.testing.cases import adaln, attention, linear, mamba2, moe, remask
from twotower_kernels.testing.cases.op import Op

OPS: dict[str, Op] = attention.OPS | linear.OPS | mamba2.OPS | moe.OPS | adaln.OPS | remask.OPS
