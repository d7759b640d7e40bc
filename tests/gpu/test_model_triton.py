"""A recorded model through the GPU's kernels, Triton's in its interpreter and CUDA C++ on the host: logits, states and
a generation."""

import pytest

from tests.gpu.triton_checks import triton_kernels
from tests.model import test_generate_package as generations
from tests.paths import GOLDEN
from tests.simt.overlay import cuda_kernels
from twotower_kernels import TwoTowerModel
from twotower_kernels.bench.checks import recordings


def test_recorded_tensors() -> None:
    name = recordings.FLOAT32[0]
    model = TwoTowerModel.from_pretrained(GOLDEN / name)
    with triton_kernels(), cuda_kernels():
        outputs = recordings.outputs_of(model, recordings.recorded(name))
    for key in recordings.output_keys(name):
        recordings.assert_recorded_float32(outputs[key], recordings.expected(name, key))


@pytest.mark.parametrize("index", [3])
def test_generates_what_was_recorded(index: int) -> None:
    with triton_kernels(), cuda_kernels():
        generations.test_generates_what_was_recorded("tiny", index)
