"""Every op under autocast: as `F.linear` and `F.scaled_dot_product_attention` where it multiplies matrices, else as it
is; the same through the public function, the dispatcher and torch.compile. The yardstick is the op outside autocast, on
arguments cast by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import twotower_kernels as tt
from tests.kernels.op_arguments import OPS, arguments, floating, overload, written
from twotower_kernels.testing.drawing import DTYPES

LOWERED = {
    "block_attention": ("q", "k", "v", "k_context", "v_context"),
    "context_attention": ("q", "k_context", "v_context"),
    "linear": ("x", "weight", "bias"),
    "merge_attention": ("out_a", "out_b"),
    "moe_experts": ("x", "w_up", "w_down", "shared_up", "shared_down", "up_bias", "down_bias"),
}


def autocast(dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(dtype)


def outcome(op: str, given: list[Any]) -> list[Tensor]:
    """What the op returns, then what it wrote."""
    inputs = [x.clone() if n in written(op) else x for n, x in enumerate(given)]
    got = overload(op)(*inputs)
    return [got] if isinstance(got, Tensor) else [*(got or []), *(inputs[n] for n in written(op))]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("inside", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_every_op(op: str, dtype: torch.dtype, inside: torch.dtype) -> None:
    given = arguments(op, dtype)
    by_hand = list(given)
    for name in LOWERED.get(op, ()):
        place = floating(op, given)[name]
        by_hand[place] = cast(given[place], inside)
    with autocast(inside):
        got = outcome(op, given)
        with torch.autocast("cpu", enabled=False):
            assert_same(outcome(op, given), outcome(op, list(given)))
    assert_same(got, outcome(op, by_hand))


@pytest.mark.parametrize(("op", "odd"), [(op, name) for op, names in LOWERED.items() for name in names])
def test_mixed_dtypes_are_cast_alike(op: str, odd: str) -> None:
    given = arguments(op)
    place = floating(op, given)[odd]
    given[place] = given[place].half()
    by_hand = list(given)
    for name in LOWERED[op]:
        by_hand[floating(op, given)[name]] = given[floating(op, given)[name]].bfloat16()
    with autocast():
        assert_same(outcome(op, given), outcome(op, by_hand))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA"])
def test_every_op_is_registered(op: str, key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"twotower::{op}", key)


def test_on_a_gpu_its_own_autocast_counts() -> None:
    """With tensors that have a device and no data."""
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode():
            gpu, host = (torch.empty(2, 3, 1, 4, device=device) for device in ("cuda", "cpu"))
            lowered = torch.get_autocast_dtype("cuda")
            assert tt.block_attention(gpu, gpu.double().float(), gpu.bfloat16()).dtype == lowered
            rows = torch.empty(2, 4, device="cuda")
            assert torch.ops.twotower.linear(rows, rows, None).dtype == lowered
            assert tt.block_attention(host, host, host).dtype == torch.float32
            with autocast():
                assert tt.block_attention(host, host, host).dtype == torch.bfloat16
                assert tt.block_attention(gpu, gpu, gpu).dtype == lowered
    finally:
        torch.set_autocast_enabled("cuda", False)


# --- the public functions -------------------------------------------------------------------------------------------


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


Q, K, V, CONTEXT = draw(2, 3, 2, 8), draw(2, 3, 1, 8, seed=1), draw(2, 3, 1, 8, seed=2), draw(2, 5, 1, 8, seed=3)


@pytest.mark.parametrize("first", DTYPES)
@pytest.mark.parametrize("second", DTYPES)
def test_attention_is_cast_as_pytorchs(first: torch.dtype, second: torch.dtype) -> None:
    """The same dtype, or an error where it has one: float64 is left alone, and does not mix."""
    q, k, v = Q.to(first), K.to(second), V.to(second)
    with autocast():
        if (first == torch.float64) != (second == torch.float64):
            with pytest.raises(RuntimeError, match="same dtype"):
                F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True)
            with pytest.raises(TypeError, match=r"k: expected torch\.\w+ as q, got"):
                tt.block_attention(q, k, v)
            return
        theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True)
        out, lse = tt.block_attention(q, k, v, return_lse=True)
    assert out.dtype == theirs.dtype
    exact = [x if x.dtype == torch.float64 else x.bfloat16() for x in (q, k, v)]
    assert_same([out, lse], list(tt.block_attention(*exact, return_lse=True)))


def low(*tensors: Tensor) -> list[Tensor]:
    return [x.bfloat16() for x in tensors]


EXPERTS = torch.tensor([[0, 2], [1, 0], [2, 1]])
X, UP, DOWN, SHARED = draw(3, 8), draw(3, 5, 8, seed=1), draw(3, 8, 5, seed=2), draw(5, 8, seed=3)
WEIGHTS, ROWS = draw(3, 2, seed=4), draw(2, 3, 8, seed=5)

PUBLIC: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {  # under autocast; by hand
    "block_attention": (
        lambda: tt.block_attention(Q, *low(K), V, *low(CONTEXT), CONTEXT),
        lambda: tt.block_attention(*low(Q, K, V, CONTEXT, CONTEXT)),
    ),
    "context_attention": (
        lambda: tt.context_attention(Q, *low(CONTEXT), CONTEXT, return_lse=True),
        lambda: tt.context_attention(*low(Q, CONTEXT, CONTEXT), return_lse=True),
    ),
    "merge_attention": (
        lambda: tt.merge_attention(Q, Q[..., 0], *low(Q), Q[..., 1]),
        lambda: tt.merge_attention(*low(Q), Q[..., 0], *low(Q), Q[..., 1]),
    ),
    "moe_experts": (
        lambda: tt.moe_experts(*low(X), UP, *low(DOWN), WEIGHTS, EXPERTS, shared_up=SHARED, shared_down=SHARED.T),
        lambda: tt.moe_experts(
            *low(X, UP, DOWN), WEIGHTS, EXPERTS, shared_up=SHARED.bfloat16(), shared_down=SHARED.T.bfloat16()
        ),
    ),
    "moe_route": (
        lambda: tt.moe_route(*low(X), top_k=2),
        lambda: tt.moe_route(X.bfloat16().float(), top_k=2),
    ),
    "moe_gate": (lambda: tt.moe_gate(*low(X), SHARED), lambda: tt.moe_gate(*low(X), SHARED)),
    "rms_norm": (lambda: tt.rms_norm(*low(X), X[0], eps=1e-5), lambda: tt.rms_norm(*low(X), X[0], eps=1e-5)),
    "gated_residual": (
        lambda: tt.gated_residual(*low(ROWS), ROWS),
        lambda: tt.gated_residual(ROWS.bfloat16().float(), ROWS),
    ),
    "gated_residual_wide": (
        lambda: tt.gated_residual(ROWS, *low(ROWS)),
        lambda: tt.gated_residual(ROWS, *low(ROWS)),
    ),
    "gated_residual_adaln_norm": (
        lambda: tt.gated_residual_adaln_norm(*low(ROWS), ROWS, None, X[0], None, None, eps=1e-5),
        lambda: tt.gated_residual_adaln_norm(ROWS.bfloat16().float(), ROWS, None, X[0], None, None, eps=1e-5),
    ),
    "remask": (
        lambda: tt.remask(ROWS, EXPERTS[:2].repeat(1, 2)[:, :3], mask_token_id=0, temperature=1.0),
        lambda: tt.remask(ROWS, EXPERTS[:2].repeat(1, 2)[:, :3], mask_token_id=0, temperature=1.0),
    ),
}


@pytest.mark.parametrize("op", PUBLIC)
def test_public_functions(op: str) -> None:
    """Also where dtypes differ, and compiled."""
    call, by_hand = PUBLIC[op]
    expected = by_hand()
    with autocast():
        got = call()
        compiled = torch.compile(call, backend="eager", fullgraph=True)()
    assert_same(got, expected)
    assert_same(compiled, expected)


def test_differing_dtypes_stay_errors_without_autocast() -> None:
    with autocast(), torch.autocast("cpu", enabled=False):
        for op in ("block_attention", "context_attention", "moe_experts", "gated_residual"):
            with pytest.raises(TypeError):
                PUBLIC[op][0]()


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_storage_is_written_in_its_own_dtype(storage: torch.dtype) -> None:
    ours, expected = ([torch.zeros(2, 6, 1, 8, dtype=storage) for _ in range(2)] for _ in range(2))
    tt.append_kv(*expected, K.to(storage), V.bfloat16().to(storage), 2)
    with autocast():
        tt.append_kv(*ours, K, V.bfloat16(), 2)
        assert_same(ours, expected)
        torch.ops.twotower.append_kv(*ours, K + 1, V.half(), torch.zeros(2, dtype=torch.int64), None, None, None)
    assert_same([ours[0][:, :3], ours[1][:, :3]], [(K + 1).to(storage), V.half().to(storage)])
    before = [x.clone() for x in ours]
    with autocast(), pytest.raises(TypeError, match=r"k: expected|v: expected|k_context: expected"):
        tt.append_kv(*ours, K.double(), V.double(), 2)
    with pytest.raises(TypeError, match="v: expected"):
        tt.append_kv(*ours, K.to(storage), V.half(), 2)
    assert_same(ours, before)


def test_storage_is_written_by_compiled_code() -> None:
    expected, ours = ([torch.zeros(2, 6, 1, 8) for _ in range(2)] for _ in range(2))
    tt.append_kv(*expected, *(x.bfloat16().float() for x in (K, V)), 2)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def append(k_context: Tensor, v_context: Tensor) -> None:
        tt.append_kv(k_context, v_context, K.bfloat16(), V.bfloat16(), 2)

    with autocast():
        append(*ours)
    assert_same(ours, expected)


def test_results_in_place_are_not_cast() -> None:
    """As PyTorch's own functions with `out=`."""
    out = torch.empty_like(Q)
    with autocast():
        assert torch.mm(X.T, X, out=torch.empty(8, 8)).dtype == torch.float32
        tt.block_attention(Q, K, V, CONTEXT, CONTEXT, out=out)
        with pytest.raises(TypeError, match=r"k: expected torch\.float32 as q, got torch\.bfloat16"):
            tt.block_attention(Q, *low(K, V), out=out)
    assert_same([out], [tt.block_attention(Q, K, V, CONTEXT, CONTEXT)])
    with autocast():
        tt.context_attention(Q, CONTEXT, CONTEXT, out=out)
    assert_same([out], [tt.context_attention(Q, CONTEXT, CONTEXT)])


# --- gradients ------------------------------------------------------------------------------------------------------


def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return tt.block_attention(q, k, v, CONTEXT, CONTEXT).float().sin().sum()


def gradients(function: Callable[..., Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
    function(*leaves).backward()
    return [x.grad for x in leaves if x.grad is not None]


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return tt.block_attention(*low(q, k, v, CONTEXT, CONTEXT)).float().sin().sum()


def test_gradients_come_in_the_dtype_of_the_leaves() -> None:
    with autocast():
        inside = gradients(loss)
        transformed = torch.func.grad(loss, argnums=(0, 1, 2))(Q, K, V)
        mapped = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(Q[None], K[None], V[None])
        compiled = gradients(torch.compile(loss, backend="aot_eager", fullgraph=True))
    leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
    with autocast():
        total = loss(*leaves)
    total.backward()
    expected = gradients(by_hand)
    assert [x.dtype for x in expected] == [torch.float32] * 3
    for got in (inside, list(transformed), [x[0] for x in mapped], compiled, [x.grad for x in leaves]):
        assert_same(got, expected)


def test_a_backward_under_autocast_keeps_its_precision() -> None:
    """What was computed outside is differentiated in its own dtype, whatever is on when the gradients are."""
    leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
    total = loss(*leaves)
    with autocast():
        total.backward()
    assert_same([x.grad for x in leaves], gradients(loss))
