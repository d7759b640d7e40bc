"""What is tried of each op: a file per family, in which strategies draw its inputs."""

from twotower_kernels.testing.cases import adaln, attention
from twotower_kernels.testing.cases.op import Op

OPS: dict[str, Op] = adaln.OPS | attention.OPS
