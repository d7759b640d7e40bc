"""The mixture of experts at the released sizes against loops of PyTorch products: `python -m bench.bench_moe`.

Weights are 2.6 GB of bfloat16, of which a block of 16 tokens reads about half. The last program only reads: a sum over
as many bytes shows what the memory gives.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

import twotower_kernels as tt
from bench.timing import Report
from reference import moe

E, K, H, I, J = 128, 6, 2688, 1856, 3712  # noqa: E741


def every_expert(x, w_up, w_down, weights, experts, *, shared_up, shared_down):  # type: ignore[no-untyped-def]
    """What one writes first: for every expert, which tokens chose it?"""
    total = torch.zeros(x.shape, dtype=torch.float32)
    for e in range(len(w_up)):
        token, choice = (experts == e).nonzero(as_tuple=True)
        if len(token):
            y = F.linear(F.linear(x[token], w_up[e]).relu().square(), w_down[e])
            total.index_add_(0, token, y.float() * weights[token, choice, None])
    return total.to(x.dtype) + F.linear(F.linear(x, shared_up).relu().square(), shared_down)


def sorted_once(x, w_up, w_down, weights, experts, *, shared_up, shared_down):  # type: ignore[no-untyped-def]
    """The best loop: pairs sorted once, only the experts that were chosen, one gather and one sum over all."""
    order = experts.flatten().argsort(stable=True)
    token = order // experts.shape[1]
    counts = experts.flatten().bincount(minlength=len(w_up)).tolist()
    parts = [
        F.linear(F.linear(part, w_up[e]).relu().square(), w_down[e])
        for e, part in enumerate(x[token].split(counts))
        if len(part)
    ]
    y = torch.cat(parts).float() * weights.flatten()[order, None]
    total = torch.zeros(x.shape, dtype=torch.float32).index_add_(0, token, y)
    return total.to(x.dtype) + F.linear(F.linear(x, shared_up).relu().square(), shared_down)


def close(got: Tensor, expected: Tensor) -> None:
    """2-norms: PyTorch's bfloat16 products are rounded between the two, ours are not."""
    got, expected = got.double(), expected.double()
    assert (got - expected).norm() <= 8e-3 * expected.norm(), "outputs differ"


def router(report: Report, n: int) -> tuple[Tensor, Tensor]:
    """Times product and choice; the weights and experts of random tokens."""
    inputs = moe.make_inputs("moe_gate", dict(n=n, e=E, h=H), dtype=torch.bfloat16)
    bias = torch.zeros(E)
    logits = tt.moe_gate(**inputs) / H**0.5
    torch.testing.assert_close(logits * H**0.5, moe.moe_gate(**inputs), rtol=1e-12, atol=1e-9)
    options = dict(top_k=K, scaling=2.5)
    weights, experts = tt.moe_route(logits, bias, **options)
    assert torch.equal(experts, moe.moe_route(logits, bias, **options)[1])
    report.add(
        f"moe_gate [{n}, {H}] x [{E}, {H}]",
        {
            "twotower_kernels": lambda: tt.moe_gate(**inputs),
            "PyTorch, float64": lambda: moe.moe_gate(**inputs),
        },
        flops=2 * n * E * H,
    )

    def topk() -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        chosen = (scores + bias).topk(K).indices
        picked = scores.gather(1, chosen)
        return (picked / (picked.sum(1, keepdim=True) + 1e-20) * 2.5).float(), chosen.int()

    report.add(
        f"moe_route [{n}, {E}]",
        {"twotower_kernels": lambda: tt.moe_route(logits, bias, **options), "PyTorch, topk": topk},
    )
    return weights, experts


def main() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16()

    def stacked(*shape: int) -> Tensor:
        """Experts that differ in size alone, since drawing 1.3 billion numbers takes longer than the benchmark."""
        sizes = torch.linspace(0.5, 1.5, E).bfloat16()[:, None, None]
        return torch.mul(normal(*shape), sizes, out=torch.empty((E, *shape), dtype=torch.bfloat16))

    w_up, w_down = stacked(I, H), stacked(H, I)
    shared = dict(shared_up=normal(J, H), shared_down=normal(H, J))
    report = Report("mixture of experts, bfloat16, 128 experts, 6 per token, and a shared one")
    for n in (16, 64):
        weights, experts = router(report, n)
        x = torch.randn(n, H, generator=generator).bfloat16()
        arguments = x, w_up, w_down, weights, experts
        ours, loop = tt.moe_experts(*arguments, **shared), sorted_once(*arguments, **shared)
        close(ours, loop)
        close(every_expert(*arguments, **shared), loop)
        active = len(experts.unique())
        size = 2 * (2 * active * I * H + 2 * J * H)
        read = [w.view(torch.int64) for w in (w_up[:active], w_down[:active], *shared.values())]
        report.add(
            f"moe_experts, {n} tokens, {active} experts",
            {
                "twotower_kernels": lambda a=arguments: tt.moe_experts(*a, **shared),
                "PyTorch, every expert": lambda a=arguments: every_expert(*a, **shared),
                "PyTorch, sorted once": lambda a=arguments: sorted_once(*a, **shared),
                "sum of as many bytes": lambda r=read: [w.sum() for w in r],
            },
            bytes=size,
            flops=2 * 2 * n * H * (K * I + J),
        )
    report.show()


if __name__ == "__main__":
    main()
