"""What a mask lets a query see is what transformers' own matrix says, whatever pattern, padding and cache."""

import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import masking_utils as theirs

from tests.integrations.tiny_models import SIZES, padded_batch, tiny
from twotower_kernels.integrations.transformers import BlockCache, register
from twotower_kernels.integrations.transformers.attention import attention
from twotower_kernels.integrations.transformers.masks import mask

register()


def compare(queries: int, keys: int, sinks: Tensor | None = None, **arguments: object) -> None:
    """Attention through a mask of ours, and through the matrix of theirs, for all queries that are no padding."""
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    q = torch.randn(2, 4, queries, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, keys, 8, generator=generator, dtype=torch.float64)
    seen = theirs.sdpa_mask(2, queries, keys, **arguments, allow_is_causal_skip=False).expand(2, 1, queries, keys)
    logits = (q @ k.repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(~seen, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None, None].expand(2, 4, queries, 1)], 3)
    wanted = (logits.softmax(3)[..., :keys] @ v.repeat_interleave(2, 1)).transpose(1, 2)
    module = nn.Module()
    module.is_causal = False
    found, _ = attention(module, q, k, v, mask(2, queries, keys, **arguments), s_aux=sinks)
    offset, padding = int(arguments.get("q_offset", 0)), arguments.get("attention_mask")
    real = torch.ones(2, queries, dtype=torch.bool)
    if padding is not None:
        real = nn.functional.pad(padding, (0, offset + queries))[:, offset : offset + queries].bool()
        assert not found[~real].any()
    torch.testing.assert_close(found[real], wanted[real])


@st.composite
def paddings(draw: st.DrawFn, tokens: int) -> Tensor | None:
    """None, or for two rows where their tokens begin and end."""
    if draw(st.booleans()):
        return None
    places = st.tuples(st.integers(0, tokens - 1), st.integers(0, tokens)).filter(lambda x: x[0] < x[1])
    begin, end = torch.tensor([draw(places), draw(places)]).T
    t = torch.arange(tokens)
    return (t >= begin[:, None]) & (t < end[:, None])


@given(st.data(), st.integers(1, 9), st.integers(0, 11), st.integers(1, 6))
def test_chunks(data: st.DataObject, queries: int, offset: int, size: int) -> None:
    """Chunks are counted from each row's first token; also with rows to spare, and a first key that is a later one."""
    padding = data.draw(paddings(offset + queries))
    left = torch.zeros(2, dtype=torch.long) if padding is None else (padding.cumsum(1) == 0).sum(1)
    kv_offset = data.draw(st.integers(0, max(offset - size + 1, 0)))
    spare = data.draw(st.integers(0, 3)) if kv_offset == 0 else 0
    compare(
        queries,
        offset + queries + spare - kv_offset,
        q_offset=torch.tensor(offset) if data.draw(st.booleans()) else offset,
        kv_offset=kv_offset,
        mask_function=theirs.chunked_causal_mask_function(size, left),
        attention_mask=padding,
    )


@given(st.data(), st.integers(1, 12), st.integers(0, 7), st.booleans())
def test_both_sides(data: st.DataObject, tokens: int, distance: int, sinks: bool) -> None:
    compare(
        tokens,
        tokens,
        torch.randn(4, dtype=torch.float64) if sinks else None,
        mask_function=theirs.sliding_window_bidirectional_mask_function(distance),
        attention_mask=data.draw(paddings(tokens)),
    )


@given(st.lists(st.lists(st.integers(1, 5), min_size=1), min_size=2, max_size=2), st.sampled_from([None, 2, 4]))
def test_packed(lengths: list[list[int]], window: int | None) -> None:
    tokens = max(map(sum, lengths))
    rows = [[*row, tokens - sum(row)] for row in lengths]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    numbers = theirs.find_packed_sequence_indices(positions)
    if numbers is None:
        return
    pattern = theirs.causal_mask_function if window is None else theirs.sliding_window_causal_mask_function(window)
    compare(tokens, tokens, mask_function=theirs.packed_sequence_compatibility_function(pattern, positions, numbers))


def test_offsets_are_not_read() -> None:
    """A tensor without numbers will do, and a 2-D mask may be shorter than the cache."""
    offset = torch.empty((), dtype=torch.long, device="meta")
    for pattern in (theirs.causal_mask_function, theirs.sliding_window_causal_mask_function(3)):
        assert mask(2, 3, 12, q_offset=offset, mask_function=pattern).lens.device.type == "meta"
    left = torch.zeros(2, dtype=torch.long, device="meta")
    for queries in (1, 5):
        found = mask(2, queries, 12, q_offset=offset, mask_function=theirs.chunked_causal_mask_function(4, left))
        assert found.shape == (2, 1, queries, 12)
    short = mask(2, 3, 12, q_offset=torch.tensor(4), attention_mask=torch.ones(2, 6))
    assert short.lens.tolist() == [6, 6] and short.block_lens.tolist() == [2, 2]


def test_models() -> None:
    """Llama 4's chunks with every cache, ModernBERT's windows to both sides, packed prompts of Llama and Mistral."""
    ids, padding = padded_batch()
    sizes = {**SIZES, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 4}
    torch.manual_seed(7)
    llama4 = transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(**sizes, layer_types=["chunked_attention"] * 2)
    )
    options = {"do_sample": False, "max_new_tokens": 12, "attention_mask": padding}
    llama4.eval().set_attn_implementation("eager")
    wanted = llama4.generate(ids, **options)
    llama4.set_attn_implementation("twotower")
    for page_size in (None, 3):
        cache = BlockCache(llama4.config, 3, 23, page_size=page_size)
        assert torch.equal(llama4.generate(ids, **options, past_key_values=cache), wanted)
    for cache_implementation in ("dynamic", "static"):
        found = llama4.generate(ids, **options, cache_implementation=cache_implementation)
        assert torch.equal(found, wanted)

    sizes = SIZES | {"local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}
    bert = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**sizes)).eval()
    same(bert, input_ids=ids, attention_mask=padding)
    same(bert, input_ids=ids.flip(1), attention_mask=padding.flip(1))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0]]).expand(3, -1)
    for name in ("Llama", "Mistral"):
        same(tiny(name), input_ids=ids, position_ids=positions, use_cache=False)


def same(model: nn.Module, **inputs: Tensor) -> None:
    found = []
    for implementation in ("eager", "twotower"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits = model(**inputs).logits
        found.append(logits[inputs["attention_mask"].bool()] if "attention_mask" in inputs else logits)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
