"""How each published attention pattern is said with `block_attention`: blocks folded into the batch, and lengths.

A pattern becomes a list of calls. A call folds blocks into the batch; a block is a few query rows with keys of their
own and the length of the context row that it reads. Numbers are rows and columns of the recorded mask, the masks of a
batch laid one after the other. Every visible set here is a prefix of a context row plus the own block:

    left padding     the context row starts at the first real token (a view or a page table), lengths count real tokens
    right padding    lengths; padded rows stand behind block_lens and come out empty
    short last block block_lens
    token by token   causal
    sliding window   window, anchored at the start of the block
    clean half       strict block-causal for the noisy queries, the same context_lens for the clean ones, which bring
                     their own block; both halves read the same context rows through context_index
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Block:
    """Query rows and the columns of their own keys, one each; rows of padding that come along; what it reads."""

    queries: range
    keys: range
    context: int = 0
    context_len: int = 0
    padding: range = range(0)


@dataclass
class Call:
    """One call: its blocks, the columns of each context row (None: a place nobody may look at), its options."""

    blocks: list[Block]
    contexts: list[list[int | None]]
    causal: bool = False
    window: int | None = None
    positions: bool = field(default=False, kw_only=True)  # the recorded position_ids are context_len + place in block


def cut(length: int, block: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each block, the last one possibly short."""
    return ((start, min(start + block, length)) for start in range(0, length, block))


def shifted(start: int, end: int, offset: int) -> range:
    return range(start + offset, end + offset)


def half(length: int, block: int, *, rows: int, columns: int, context: int = 0) -> list[Block]:
    """The blocks of one half, from row `rows` and column `columns` on; each sees all of the context before it."""
    return [
        Block(shifted(start, end, rows), shifted(start, end, columns), context, start)
        for start, end in cut(length, block)
    ]


def training(*, clean_first: bool = False, causal_clean: bool = False, causal_noisy: bool = False) -> Callable:
    """Noisy half: clean context of strictly earlier blocks, own noisy block. Clean half: the same, own clean block."""

    def build(case: dict[str, Any]) -> list[Call]:
        length, block = case["parameters"]["seq_len"], case["parameters"]["block_size"]
        noisy, clean = (length, 0) if clean_first else (0, length)
        contexts: list[list[int | None]] = [[*shifted(0, length, clean)]]
        return [
            Call(half(length, block, rows=noisy, columns=noisy), contexts, causal=causal_noisy),
            Call(half(length, block, rows=clean, columns=clean), contexts, causal=causal_clean),
        ]

    return build


def training_packed(case: dict[str, Any]) -> list[Call]:
    """One training pass per document, all of them in one call: a context row per document."""
    blocks: list[Block] = []
    contexts: list[list[int | None]] = []
    for row, documents in enumerate(case["parameters"]["document_lengths"]):
        start = row * case["q_len"]
        for length in documents:
            for offset in (start, start + length):
                blocks += half(
                    length, case["parameters"]["block_size"], rows=offset, columns=offset, context=len(contexts)
                )
            contexts.append([*shifted(0, length, start + length)])
            start += 2 * length
    return [Call(blocks, contexts)]


def block_causal(case: dict[str, Any]) -> list[Call]:
    """Tokens see earlier blocks and the whole of their own: the clean half alone, up to its present length."""
    length = case["q_len"]
    return [Call(half(length, case["parameters"]["block_size"], rows=0, columns=0), [[*range(length)]])]


def block_causal_left_padded(case: dict[str, Any]) -> list[Call]:
    """Blocks are cut at physical columns, so the first real block of a row may be short."""
    p = case["parameters"]
    blocks, contexts = [], []
    for row, padding in enumerate(p["left_padding"]):
        first = row * p["length"]
        contexts.append([*shifted(padding, p["length"], first)])
        for start, end in cut(p["length"], p["block_size"]):
            real = min(max(start, padding), end)
            tokens, past = shifted(real, end, first), max(start - padding, 0)
            blocks.append(Block(tokens, tokens, row, past, padding=shifted(start, real, first)))
    return [Call(blocks, contexts, positions=True)]


def two_tower(case: dict[str, Any]) -> list[Call]:
    """Noisy queries; keys [clean | noisy]: clean context of strictly earlier blocks, own noisy block."""
    length = case["q_len"]
    return [Call(half(length, case["parameters"]["block_size"], rows=0, columns=length), [[*range(length)]])]


def padded_rows(case: dict[str, Any]) -> Iterator[tuple[int, int, int]]:
    """(row, prompt length, real length) of a right-padded batch."""
    p = case["parameters"]
    for row, (prompt, padding) in enumerate(zip(p["context_lengths"], p["right_padding"], strict=True)):
        real = p["seq_len"] - padding
        yield row, min(prompt, real), real


def decoder_with_padding(case: dict[str, Any]) -> list[Call]:
    length, width = case["q_len"], case["k_len"]
    blocks, contexts = [], []
    for row, _, real in padded_rows(case):
        contexts.append([*shifted(0, length, row * width)])
        for start, end in cut(length, case["parameters"]["block_size"]):
            last = min(max(start, real), end)
            keys = shifted(start, last, row * width + length)
            padding = shifted(last, end, row * length)
            blocks.append(Block(shifted(start, last, row * length), keys, row, min(start, real), padding))
    return [Call(blocks, contexts)]


def encoder_with_context(case: dict[str, Any]) -> list[Call]:
    """The blocks that lie wholly in the prompt see just the prompt: together they are one block, bidirectional, whose
    context is the remainder of the prompt, a view of the same storage. Later blocks contain or follow its end."""
    length, size = case["q_len"], case["parameters"]["block_size"]
    blocks, contexts = [], []
    for row, prompt, real in padded_rows(case):
        first, whole = row * length, prompt // size * size
        contexts.append([*shifted(0, length, first)])
        if whole:
            tokens = shifted(0, whole, first)
            blocks.append(Block(tokens, tokens, len(contexts), prompt - whole))
            contexts.append([*shifted(whole, length, first)])
        for start, end in cut(length, size):
            if start < whole:
                continue
            last = min(max(start, real), end)
            tokens = shifted(start, last, first)
            mine = len(contexts) - 1 - bool(whole)
            blocks.append(Block(tokens, tokens, mine, min(start, real), padding=shifted(last, end, first)))
    return [Call(blocks, contexts)]


def diffusion_gemma_training(*, sliding: bool) -> Callable:
    """Response blocks over prompt and earlier response; sliding layers: over the last tokens before the block."""

    def build(case: dict[str, Any]) -> list[Call]:
        p = case["parameters"]
        response, encoder, width = p["response_length"], p["encoder_length"], case["k_len"]
        blocks, contexts = [], []
        for row, prompt in enumerate(p["prefix_lengths"]):
            contexts.append([*shifted(0, encoder, row * width)])
            mine = half(response, p["block_size"], rows=row * response, columns=row * width + encoder, context=row)
            for block in mine:
                block.context_len += prompt
            blocks += mine
        return [Call(blocks, contexts, window=context_window(p) if sliding else None)]

    return build


def diffusion_gemma_decode(*, sliding: bool) -> Callable:
    """A canvas over a left-padded context; a sliding layer may read the whole cache through the window."""

    def build(case: dict[str, Any]) -> list[Call]:
        p = case["parameters"]
        length, canvas, width = p["context_length"], p["canvas_length"], case["k_len"]
        first = p["first_context_index"] if sliding else 0  # earlier tokens have no column: the window must hide them
        blocks, contexts = [], []
        for row, padding in enumerate(p["left_padding"]):
            columns = [row * width + t - first if t >= first else None for t in range(padding, length)]
            keys = shifted(0, canvas, row * width + length - first)
            blocks.append(Block(shifted(0, canvas, row * canvas), keys, row, len(columns)))
            contexts.append(columns)
        return [Call(blocks, contexts, window=context_window(p) if sliding else None)]

    return build


def context_window(parameters: dict[str, Any]) -> int | None:
    """Of the context, both DiffusionGemma sources keep one token less than sliding_window."""
    return None if parameters["sliding_window"] is None else parameters["sliding_window"] - 1


def decode_last_block(case: dict[str, Any]) -> list[Call]:
    size, width = case["q_len"], case["k_len"]
    prefix = width - size
    return [Call([Block(range(size), range(prefix, width), 0, prefix)], [[*range(prefix)]])]


PATTERNS: dict[str, Callable[[dict[str, Any]], list[Call]]] = {
    "attention_gym.block_diffusion": training(),
    "automodel.diffusion_gemma_full": diffusion_gemma_training(sliding=False),
    "automodel.diffusion_gemma_sliding": diffusion_gemma_training(sliding=True),
    "bd3lm.sampling_without_cache": block_causal,
    "bd3lm.training": training(),
    "diffusion_gemma.decode_full": diffusion_gemma_decode(sliding=False),
    "diffusion_gemma.decode_sliding": diffusion_gemma_decode(sliding=True),
    "dllm.bd3lm_training": training(),
    "dllm.sampling_left_padded": block_causal_left_padded,
    "e2d2.bd3lm_training": training(clean_first=True),
    "e2d2.decoder": two_tower,
    "e2d2.decoder_with_padding": decoder_with_padding,
    "e2d2.encoder": block_causal,
    "e2d2.encoder_with_context": encoder_with_context,
    "llada2.window": block_causal,
    "megatron.two_tower_denoiser": two_tower,
    "megatron_bridge.nemotron_labs_training": training(causal_clean=True),
    "sdar.decode_last_block": decode_last_block,
    "sdar.prefill": block_causal,
    "sdar.training_packed": training_packed,
    "wedlm.training": training(clean_first=True, causal_clean=True, causal_noisy=True),
}
