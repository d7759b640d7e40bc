"""Every op under PyTorch's transforms: reverse and forward derivatives, torch.func and torch.vmap. None may give a
silent zero: a derivative is right, or its absence is an error that names the op."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import twotower_kernels as tt
from tests.kernels.op_arguments import ARGUMENTS, OPS, arguments, floating, overload, written
from twotower_kernels.reference import attention

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # of PyTorch's forward mode

PLACES = [(op, argument) for op in OPS for argument in floating(op, arguments(op))]
DIFFERENTIABLE = {
    "block_attention": {"q", "k", "v", "sinks"},
    "context_attention": {"q", "sinks"},
    "linear": {"x", "weight", "bias"},
    "merge_attention": {"out_a", "lse_a", "out_b", "lse_b"},
}


def results(outcome: Any) -> list[Tensor]:
    """The floating results of an op."""
    tensors = [outcome] if isinstance(outcome, Tensor) else list(outcome or [])
    return [x for x in tensors if x.is_floating_point()]


def of_one_argument(op: str, place: int, given: list[Any]) -> Callable[[Tensor], Tensor]:
    """The op as a function from one of its arguments to a number; what it writes is new at every call."""

    def function(x: Tensor) -> Tensor:
        inputs = [value.clone() if n in written(op) else value for n, value in enumerate(given)]
        inputs[place] = x
        outcome = results(overload(op)(*inputs)) + [inputs[n] for n in written(op)]
        return sum((y.masked_fill(y.isinf(), 0).sin().sum() for y in outcome), torch.zeros(()))

    return function


def test_every_op_is_here() -> None:
    assert set(OPS) == set(ARGUMENTS)


# --- forward mode ---------------------------------------------------------------------------------------------------


def dual(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, torch.ones_like(x)))


FORWARD: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "dual": dual,
    "dual_without_grad": torch.no_grad()(dual),
    "jvp": lambda f, x: jvp(f, (x,), (torch.ones_like(x),)),
    "jvp_of_jvp": lambda f, x: jvp(lambda y: jvp(f, (x,), (y,))[1], (x,), (torch.ones_like(x),)),
    "jvp_of_vmap": lambda f, x: jvp(vmap(f), (x[None],), (torch.ones_like(x)[None],)),
    "vmap_of_jvp": lambda f, x: vmap(lambda y: jvp(f, (y,), (y,)))(x[None]),
    "jacfwd": lambda f, x: jacfwd(f)(x),
}


@pytest.mark.parametrize("transform", FORWARD)
@pytest.mark.parametrize(("op", "argument"), PLACES)
def test_tangents_are_refused(op: str, argument: str, transform: str) -> None:
    given = arguments(op)
    place = floating(op, given)[argument]
    if "vmap" in transform and written(op):
        return vmap_of_what_is_written_alone(op, place, given)
    with pytest.raises(NotImplementedError, match=rf"^twotower::{op} has no forward-mode derivative"):
        FORWARD[transform](of_one_argument(op, place, given), given[place])


def vmap_of_what_is_written_alone(op: str, place: int, given: list[Any]) -> None:
    """Tangents beneath a mapping are refused too, where everything written is mapped."""
    inputs = [x[None].clone() if n in written(op) or n == place else x for n, x in enumerate(given)]
    in_dims = tuple(0 if n in written(op) or n == place else None for n in range(len(given)))

    def function(x: Tensor) -> None:
        vmap(overload(op), in_dims, out_dims=None)(*inputs[:place], x, *inputs[place + 1 :])

    with pytest.raises(NotImplementedError, match=rf"^twotower::{op} has no forward-mode derivative"):
        jvp(function, (inputs[place],), (torch.ones_like(inputs[place]),))


@pytest.mark.parametrize(("op", "argument"), [place for place in PLACES if written(place[0])])
def test_nothing_is_written_before_tangents_are_refused(op: str, argument: str) -> None:
    given = arguments(op)
    place = floating(op, given)[argument]
    before = [given[n].clone() for n in written(op)]
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        x = forward_ad.make_dual(given[place], torch.ones_like(given[place]))
        overload(op)(*given[:place], x, *given[place + 1 :])
    assert all(torch.equal(given[n], x) for n, x in zip(written(op), before, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_without_tangents_a_level_changes_nothing(op: str) -> None:
    alone, inside = arguments(op), arguments(op)
    expected = overload(op)(*alone)
    with forward_ad.dual_level():
        got = overload(op)(*inside)
    assert all(torch.equal(x, y) for x, y in zip(results(got), results(expected), strict=True))
    assert all(torch.equal(inside[n], alone[n]) for n in written(op))


def test_public_functions_refuse_tangents() -> None:
    q, k, v = (torch.randn(2, 3, 1, 4, dtype=torch.float64) for _ in range(3))
    storage = torch.zeros(2, 6, 1, 4, dtype=torch.float64)
    x, weight = torch.randn(2, 3, 4), torch.ones(4)
    calls: list[tuple[Callable[[Tensor], Any], Tensor]] = [
        (lambda q: tt.block_attention(q, k, v).square().sum(), q),
        (lambda k: tt.block_attention(q, k, v), k),
        (lambda q: tt.block_attention(q, k, v, out=torch.empty_like(v)), q),
        (lambda storage: tt.context_attention(q, storage, storage), storage),
        (lambda k: tt.append_kv(storage, storage.clone(), k, v, 0), k),
        (lambda x: tt.rms_norm(x, weight, eps=1e-5), x),
        (lambda x: tt.remask(x, torch.full((2, 3), 1), mask_token_id=1).confidence, x),
    ]
    for call, at in calls:
        with pytest.raises(NotImplementedError, match=r"^twotower::\w+ has no forward-mode derivative"):
            jvp(call, (at,), (torch.ones_like(at),))
    for second in (hessian, lambda f: jacfwd(jacrev(f)), lambda f: jacfwd(jacfwd(f))):
        with pytest.raises(NotImplementedError, match=r"^twotower::block_attention has no forward-mode derivative"):
            second(calls[0][0])(q)


# --- reverse mode ---------------------------------------------------------------------------------------------------


def by_backward(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    return gradient


REVERSE: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "backward": by_backward,
    "grad": lambda f, x: grad(f)(x),
    "vjp": lambda f, x: vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0],
    "jacrev": lambda f, x: jacrev(f)(x),
    "vmap_of_grad": lambda f, x: vmap(grad(f))(x[None])[0],
    "grad_of_vmap": lambda f, x: grad(lambda y: vmap(f)(y).sum())(x[None])[0],
}


@pytest.mark.parametrize("transform", REVERSE)
@pytest.mark.parametrize(("op", "argument"), PLACES)
def test_a_gradient_is_right_or_an_error(op: str, argument: str, transform: str) -> None:
    given = arguments(op, torch.float64)
    place = floating(op, given)[argument]
    function, x = of_one_argument(op, place, given), given[place]
    if argument not in DIFFERENTIABLE.get(op, ()):
        raised = ValueError if written(op) and transform == "grad_of_vmap" else NotImplementedError
        with pytest.raises(raised, match=rf"twotower::{op} (is not differentiable|writes into it)"):
            REVERSE[transform](function, x)
        return
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    slope = (function(x + 1e-6 * direction) - function(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((REVERSE[transform](function, x) * direction).sum(), slope, rtol=1e-7, atol=1e-8)


CASES = [
    (op, case)
    for op in ("block_attention", "context_attention", "block_causal_attention")
    for case in (attention.CASES | attention.COMPOSED)[op]
    if not case.startswith("released")
]


@pytest.mark.parametrize(("op", "case"), CASES)
def test_torch_func_has_the_gradients_of_the_specification(op: str, case: str) -> None:
    inputs = attention.make_inputs(op, case, dtype=torch.float64)
    names = [name for name in ("q", "k", "v", "sinks") if name in inputs]

    def loss(module: Any) -> Callable[..., Tensor]:
        def function(*leaves: Tensor) -> Tensor:
            out, lse = getattr(module, op)(**(inputs | dict(zip(names, leaves, strict=True))), return_lse=True)
            return out.sin().sum() + lse.masked_fill(lse.isinf(), 0).sin().sum()

        return function

    leaves = [inputs[name].clone().requires_grad_() for name in names]
    expected = torch.autograd.grad(loss(attention)(*leaves), leaves)
    got = grad(loss(tt), argnums=tuple(range(len(names))))(*(inputs[name] for name in names))
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y.nan_to_num(), rtol=1e-10, atol=1e-12)


def block_loss(module: Any) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, context: Tensor) -> Tensor:
        return module.block_attention(q, k, v, context, context.flip(1), causal=True).sin().sum()

    return function


def blocks(*leading: int) -> list[Tensor]:
    """q, k, v and a context, with further dimensions before them."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 4, 5), (2, 3, 2, 5), (2, 3, 2, 5), (2, 6, 2, 5)
    return [torch.randn(*leading, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("mapped", [(0, 0, 0, 0), (0, None, None, None), (None, 0, 0, None), (1, 2, 0, 3)])
def test_per_sample_gradients(mapped: tuple[int | None, ...]) -> None:
    whole = blocks(3)
    given = [x[0] if dim is None else x.movedim(0, dim) for x, dim in zip(whole, mapped, strict=True)]
    got = vmap(grad(block_loss(tt), argnums=(0, 1, 2)), mapped)(*given)
    for n in range(3):
        leaves = [x[0 if dim is None else n].clone() for x, dim in zip(whole, mapped, strict=True)]
        leaves = [*(x.requires_grad_() for x in leaves[:3]), leaves[3]]
        expected = torch.autograd.grad(block_loss(attention)(*leaves), leaves[:3])
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x[n], y, rtol=1e-10, atol=1e-12)


def test_gradients_of_samples_of_a_module() -> None:
    """The customary form: a module's parameters, its loss per sample, `vmap(grad(functional_call))`."""
    torch.manual_seed(0)
    module = torch.nn.Linear(5, 5, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    q, k, v, _ = blocks(3)

    def loss(attend: Any, parameters: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(functional_call(module, parameters, (q,)), k, v).square().sum()

    got, expected = (
        vmap(grad(lambda *a, f=f: loss(f, *a)), (None, 0, 0, 0))(parameters, q, k, v)
        for f in (tt.block_attention, plain_attention)
    )
    assert got["weight"].abs().min() > 0
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, S, H, D] in operations that every transform knows; a key's head serves as many of q as there are to each."""
    q = q.unflatten(-2, (k.shape[-2], -1))
    weights = torch.einsum("bsgrd,btgd->bgrst", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bgrst,btgd->bsgrd", weights, v).flatten(-3, -2)


def test_the_jacobian() -> None:
    q, k, v, _ = blocks()
    got = jacrev(lambda k: tt.block_attention(q, k, v))(k)
    torch.testing.assert_close(got, jacfwd(lambda k: plain_attention(q, k, v))(k), rtol=1e-10, atol=1e-12)


def test_gradients_for_many_results_at_once() -> None:
    q, k, v, context = blocks()
    q.requires_grad_()
    out = tt.block_attention(q, k, v, context, context)
    towards = torch.stack([out.detach(), out.detach().cos(), torch.ones_like(out)])
    (got,) = torch.autograd.grad(out, q, towards, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(out, q, each, retain_graph=True)[0] for each in towards]
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=0)


def test_a_gradient_within_a_gradient() -> None:
    """The outer transform's tensor reaches the op inside the inner one."""
    q, k, v, context = blocks()

    def loss(module: Any, q: Tensor) -> Tensor:
        inner = grad(lambda v: (v * block_loss(module)(q, k, k, context)).sum())(v)  # d/dv of something linear in v
        return inner.sum()

    def leaf_gradient(module: Any) -> Tensor:
        leaf = q.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(block_loss(module)(leaf, k, k, context) * v.numel(), leaf)
        return gradient

    torch.testing.assert_close(grad(lambda q: loss(tt, q))(q), leaf_gradient(attention), rtol=1e-9, atol=1e-10)
    leaf = q.clone().requires_grad_()
    (through,) = torch.autograd.grad(loss(tt, leaf), leaf)
    torch.testing.assert_close(through, leaf_gradient(attention), rtol=1e-9, atol=1e-10)


def test_second_derivatives_of_attention_are_refused() -> None:
    q, k, v, context = blocks()
    match = "^twotower::attention_backward is not differentiable$"
    leaf = q.clone().requires_grad_()
    (first,) = torch.autograd.grad(block_loss(tt)(leaf, k, v, context), leaf, create_graph=True)
    assert first.requires_grad
    with pytest.raises(NotImplementedError, match=match):
        first.sum().backward()
    for second in (
        lambda: grad(lambda q: grad(block_loss(tt))(q, k, v, context).square().sum())(q),
        lambda: jacrev(jacrev(block_loss(tt)))(q, k, v, context),
        lambda: grad(lambda k: grad(block_loss(tt))(q, k, v, context).square().sum())(k),
        lambda: grad(lambda q: grad(lambda q: tt.context_attention(q, context, context).sum())(q).square().sum())(q),
        lambda: torch.autograd.functional.jvp(
            lambda q: block_loss(tt)(q, k, v, context), q, q
        ),  # a gradient's gradient
    ):
        with pytest.raises(NotImplementedError, match=match):
            second()


def test_second_derivatives_of_merging() -> None:
    leaves = [x.requires_grad_() for x in arguments("merge_attention", torch.float64)]
    assert torch.autograd.gradgradcheck(tt.merge_attention, leaves)


def test_a_context_written_after_it_was_saved_is_noticed() -> None:
    q, k, v, context = (x.detach() for x in blocks())
    for write in (
        lambda: tt.append_kv(context, context.clone(), k, v, 0),
        lambda: tt.context_attention(torch.zeros_like(context), k, v, out=context),
    ):
        out = tt.block_attention(q.clone().requires_grad_(), k, v, context, context.clone())
        write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


# --- torch.vmap -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_vmap_is_a_loop(op: str) -> None:
    """Over every tensor, along different dimensions."""
    samples = [arguments(op, seed=seed) for seed in range(3)]
    alone = [overload(op)(*sample) for sample in samples]
    samples_again = [arguments(op, seed=seed) for seed in range(3)]
    is_tensor = [isinstance(x, Tensor) for x in samples[0]]
    dims = [n % (x.ndim + 1) if t else None for n, (x, t) in enumerate(zip(samples[0], is_tensor, strict=True))]
    stacked = [
        torch.stack(list(values), dim) if dim is not None else values[0]
        for values, dim in zip(zip(*samples_again, strict=True), dims, strict=True)
    ]
    tensors = [x for x, t in zip(stacked, is_tensor, strict=True) if t]

    def function(*given: Tensor) -> Any:
        left = iter(given)
        return overload(op)(*(next(left) if t else x for x, t in zip(stacked, is_tensor, strict=True)))

    got = vmap(function, tuple(d for d in dims if d is not None), out_dims=None if written(op) else 0)(*tensors)
    if written(op):
        assert got is None
        for n in written(op):
            torch.testing.assert_close(stacked[n], torch.stack([s[n] for s in samples], dims[n]), rtol=0, atol=0)
    else:
        expected = [[x] if isinstance(x, Tensor) else list(x) for x in alone]
        for x, parts in zip([got] if isinstance(got, Tensor) else got, zip(*expected, strict=True), strict=True):
            torch.testing.assert_close(x, torch.stack(parts), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", [op for op in OPS if written(op)])
def test_what_is_written_must_be_mapped(op: str) -> None:
    given = arguments(op)
    for missing in written(op):
        dims = tuple(0 if isinstance(x, Tensor) and n != missing else None for n, x in enumerate(given))
        inputs = [x if dim is None else x[None].clone() for x, dim in zip(given, dims, strict=True)]
        before = [x.clone() for x in inputs if isinstance(x, Tensor)]
        name = overload(op)._schema.arguments[missing].name
        with pytest.raises(ValueError, match=f"^{name}: twotower::{op} writes into it, expected it to be mapped"):
            vmap(overload(op), dims, out_dims=None)(*inputs)
        after = [x for x in inputs if isinstance(x, Tensor)]
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_vmap_over_nothing() -> None:
    with pytest.raises(NotImplementedError, match=r"twotower::moe_gate has no batching rule .* of size 0"):
        vmap(tt.moe_gate, (0, None))(torch.zeros(0, 3, 4), torch.zeros(5, 4))
    k = torch.zeros(0, 1, 2, 1, 4)
    vmap(lambda a, b, k: tt.append_kv(a, b, k, k, 0), out_dims=None)(k.clone(), k.clone(), k)


def test_vmap_of_public_functions() -> None:
    q, k, v, context = blocks(3)
    lens, storage = torch.tensor([[2, 6], [0, 1], [4, 4]]), torch.zeros_like(context)
    got = vmap(lambda q, k, v, c, n: tt.block_attention(q, k, v, c, c, context_lens=n))(q, k, v, context, lens)
    for n in range(3):
        alone = tt.block_attention(q[n], k[n], v[n], context[n], context[n], context_lens=lens[n])
        torch.testing.assert_close(got[n], alone, rtol=0, atol=0)
    vmap(lambda a, b, k, v: tt.append_kv(a, b, k, v, 2), out_dims=None)(storage, storage.clone(), k, v)
    assert torch.equal(storage[:, :, 2:5], k) and not storage[:, :, 5:].any()
    out = torch.empty_like(q)
    vmap(lambda q, k, v, out: tt.block_attention(q, k, v, out=out), out_dims=0)(q, k, v, out)
    torch.testing.assert_close(out, torch.stack([tt.block_attention(*x) for x in zip(q, k, v, strict=True)]))
    x = torch.randn(3, 2, 4)
    got = vmap(lambda x: tt.rms_norm(x, torch.ones(4), eps=1e-5))(x)
    torch.testing.assert_close(got, tt.rms_norm(x, torch.ones(4), eps=1e-5), rtol=0, atol=0)


# --- torch.compile --------------------------------------------------------------------------------------------------


def test_compiled_transforms() -> None:
    given = blocks(2)
    per_sample = vmap(grad(block_loss(tt)))
    compiled = torch.compile(per_sample, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), per_sample(*given), rtol=0, atol=0)
