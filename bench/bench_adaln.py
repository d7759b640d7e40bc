"""adaLN against PyTorch's own norm and elementwise operations: `python -m bench.bench_adaln`."""

import torch
from torch.nn import functional as F

import twotower_kernels as tt
from bench.timing import Report
from reference import adaln


def eager(x, weight, shift, scale, *, eps, order):  # type: ignore[no-untyped-def]
    """What one writes today."""
    shift, scale = shift[:, None], scale[:, None]
    if order == "modulate_norm":
        return F.rms_norm(x * (1 + scale) + shift, x.shape[-1:], weight, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps) * (1 + scale) + shift


def main() -> None:
    report = Report("adaln_norm, modulate_norm")
    for dtype in (torch.bfloat16, torch.float32):
        for batch in (1, 16):
            case = dict(b=batch, s=16, h=2688, order="modulate_norm")
            inputs = adaln.make_inputs("adaln_norm", case, dtype=dtype)
            ours, theirs = tt.adaln_norm(**inputs), eager(**inputs)
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
            report.add(
                f"[{batch}, 16, 2688] {dtype}",
                {"twotower_kernels": lambda i=inputs: tt.adaln_norm(**i), "PyTorch eager": lambda i=inputs: eager(**i)},
                bytes=2 * inputs["x"].numel() * inputs["x"].element_size(),
            )
    report.show()


if __name__ == "__main__":
    main()
