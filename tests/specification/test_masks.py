"""The attention patterns of the field, recorded from their original mask builders, recovered from `block_attention`.

The same patterns with other parameters are derived here entry by entry from their description, and replayed too.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import twotower_kernels as tt
from tests.paths import GOLDEN, ROOT
from tests.replay_masks import replay
from tests.specification.mask_patterns import PATTERNS
from twotower_kernels.reference.attention import block_attention

FOLDER = GOLDEN / "masks"
CASES = {case["name"]: case for case in json.loads((FOLDER / "cases.json").read_text(encoding="utf-8"))["cases"]}


def from_pages(q, k, v, k_context, v_context, **options):
    """The same call with every context token on a page of its own, in another order, in one pool."""
    rows, tokens = k_context.shape[:2]
    order = torch.randperm(rows * tokens, generator=torch.Generator().manual_seed(0))
    pools = (x.flatten(0, 1)[order].unsqueeze(1) for x in (k_context, v_context))  # [Bc,T,Hkv,D] -> [Bc*T,1,Hkv,D]
    return block_attention(q, k, v, *pools, block_table=order.argsort().view(rows, tokens), **options)


@pytest.mark.parametrize("attention", [block_attention, from_pages, tt.block_attention])
@pytest.mark.parametrize("name", CASES)
def test_recorded_mask(name, attention):
    assert replay(CASES[name], FOLDER, attention) is None


def test_every_recorded_pattern_has_a_builder_and_every_builder_a_record():
    assert {f"{case['system']}.{case['pattern']}" for case in CASES.values()} == set(PATTERNS)


# --- the replay notices what is wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bd3lm.training.n10_b4_short_last", "dllm.sampling_left_padded.b4_t12_left_padded"])
@pytest.mark.parametrize("place", [0, 7, -1])
def test_one_flipped_entry_is_noticed(name, place, tmp_path):
    tensors = load_file(FOLDER / CASES[name]["file"])
    tensors["mask"].view(-1)[place] ^= True
    save_file(tensors, tmp_path / CASES[name]["file"])
    assert "1 entries differ" in replay(CASES[name], tmp_path, block_attention)


def test_a_wrong_op_is_noticed():
    name = "automodel.diffusion_gemma_sliding.p3_7_r12_b4_window6"

    def one_too_many(*args, window=None, **options):
        return block_attention(*args, window=window + 1, **options)

    def wrong_scale(*args, **options):
        return block_attention(*args, **options, scale=0.2)

    def wrong_lse(*args, **options):
        out, lse = block_attention(*args, **options)
        return out, lse / torch.log(torch.tensor(2.0))

    assert "seen but not allowed" in replay(CASES[name], FOLDER, one_too_many)
    assert "weights" in replay(CASES[name], FOLDER, wrong_scale)
    assert "log-sum-exp" in replay(CASES[name], FOLDER, wrong_lse)
    assert "no builder" in replay(CASES[name] | {"pattern": "unheard_of"}, FOLDER, block_attention)


def test_command_line(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "tests.replay_masks", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    good, bad = CASES["e2d2.decoder.n12_b4"], CASES["e2d2.encoder.n12_b4"]
    for case in (good, bad):
        tensors = load_file(FOLDER / case["file"])
        tensors["mask"][0, -1] ^= case is bad
        save_file(tensors, tmp_path / case["file"])
    (tmp_path / "cases.json").write_text(json.dumps({"cases": [good, bad]}), encoding="utf-8")
    result = run(tmp_path)
    assert result.returncode == 1 and result.stdout.splitlines()[-1] == "1 of 2 agree"
    assert result.stdout.startswith(f"{bad['name']}: 1 entries differ")
    (tmp_path / "cases.json").write_text(json.dumps({"cases": [good]}), encoding="utf-8")
    for implementation in ("reference", "package"):
        result = run(tmp_path, "--impl", implementation)
        assert result.returncode == 0 and result.stdout == "1 of 1 agree\n"
    assert run(tmp_path / "absent").returncode == 2


# --- other parameters -----------------------------------------------------------------------------------------------


def table(batch, queries, keys, rule):
    """mask[b, q, k] = rule(b, q, k)"""
    return torch.tensor([[[bool(rule(b, q, k)) for k in range(keys)] for q in range(queries)] for b in range(batch)])


def doubled(length, block, *, clean_first=False, causal_clean=False, causal_noisy=False):
    """May position q see position k of [noisy | clean], or of [clean | noisy]?"""

    def rule(q, k):
        q_clean, k_clean = ((p < length) == clean_first for p in (q, k))
        i, j = q % length, k % length
        if q_clean == k_clean and i // block == j // block:
            return j <= i if (causal_clean if q_clean else causal_noisy) else True
        return k_clean and i // block > j // block

    return rule


def training_case(name, draw):
    length, block = draw(st.integers(1, 14)), draw(st.integers(1, 6))
    kind = {
        "e2d2": {"clean_first": True},
        "megatron_bridge": {"causal_clean": True},
        "wedlm": {"clean_first": True, "causal_clean": True, "causal_noisy": True},
    }
    rule = doubled(length, block, **kind.get(name.split(".")[0], {}))
    return {"seq_len": length, "block_size": block}, table(1, 2 * length, 2 * length, lambda b, q, k: rule(q, k)), {}


def packed_case(name, draw):
    block, total = draw(st.integers(1, 5)), draw(st.integers(2, 9))
    rows = []
    for _ in range(2):
        first = draw(st.integers(1, total - 1))
        rows.append([first, total - first])

    def rule(b, q, k):
        start = 0
        for length in rows[b]:
            if start <= q < start + 2 * length and start <= k < start + 2 * length:
                return doubled(length, block)(q - start, k - start)
            start += 2 * length

    return {"document_lengths": rows, "block_size": block}, table(2, 2 * total, 2 * total, rule), {}


def block_causal_case(name, draw):
    length, block = draw(st.integers(1, 20)), draw(st.integers(1, 6))
    return {"block_size": block}, table(1, length, length, lambda b, q, k: q // block >= k // block), {}


def left_padded_case(name, draw):
    length, block = draw(st.integers(1, 10)), draw(st.integers(1, 5))
    padding = [draw(st.integers(0, length - 1)) for _ in range(2)]
    rule = lambda b, q, k: min(q, k) >= padding[b] and q // block >= k // block  # noqa: E731
    positions = torch.tensor([[max(0, p - pad) for p in range(length)] for pad in padding])
    parameters = {"length": length, "block_size": block, "left_padding": padding, "batch": 2}
    return parameters, table(2, length, length, rule), {"position_ids": positions}


def two_tower_case(name, draw):
    length, block = draw(st.integers(1, 16)), draw(st.integers(1, 6))
    rule = lambda b, q, k: k // block < q // block if k < length else (k - length) // block == q // block  # noqa: E731
    return {"seq_len": length, "block_size": block}, table(1, length, 2 * length, rule), {}


def right_padded_case(name, draw):
    length, block = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    padding = [draw(st.integers(0, length)) for _ in range(2)]
    prompts = [draw(st.integers(0, length - p)) for p in padding]
    decoder = name.endswith("decoder_with_padding")

    def rule(b, q, k):
        real, noisy, j = length - padding[b], k >= length, k % length
        if q >= real or j >= real:
            return False
        if decoder:
            return j // block == q // block if noisy else j // block < q // block
        return j < prompts[b] or j // block <= q // block

    parameters = {
        "seq_len": length,
        "block_size": block,
        "context_lengths": prompts,
        "right_padding": padding,
        "batch": 2,
    }
    return parameters, table(2, length, length * (1 + decoder), rule), {}


def gemma_training_case(name, draw):
    response, block, extra = draw(st.integers(1, 12)), draw(st.integers(1, 5)), draw(st.integers(0, 3))
    prompts = [draw(st.integers(0, 6)) for _ in range(2)]
    window = draw(st.integers(1, 10)) if name.endswith("sliding") else draw(st.sampled_from([None, 3]))
    encoder = max(prompts) + response + extra

    def rule(b, q, k):
        if k >= encoder:
            return (k - encoder) // block == q // block
        seen = k < prompts[b] or (k < prompts[b] + response and (k - prompts[b]) // block < q // block)
        return seen and (not name.endswith("sliding") or k >= prompts[b] + q // block * block - window + 1)

    parameters = {"prefix_lengths": prompts, "response_length": response, "encoder_length": encoder}
    return (
        parameters | {"block_size": block, "sliding_window": window},
        table(2, response, encoder + response, rule),
        {},
    )


def gemma_decode_case(name, draw):
    length, window, canvas = draw(st.integers(1, 10)), draw(st.integers(1, 8)), draw(st.integers(1, 4))
    padding = [draw(st.integers(0, length)) for _ in range(2)]
    kept = min(length, window - 1) if name.endswith("sliding") else length
    parameters = {"context_length": length, "sliding_window": window, "canvas_length": canvas, "left_padding": padding}
    mask = table(2, canvas, kept + canvas, lambda b, q, k: k >= kept or k + length - kept >= padding[b])
    return parameters | {"context_kept": kept, "first_context_index": length - kept}, mask, {}


def decode_case(name, draw):
    prefix, block = draw(st.integers(0, 12)), draw(st.integers(1, 5))
    return {"block_size": block}, torch.ones(1, block, prefix + block, dtype=torch.bool), {}


MAKERS = {
    "dllm.sampling_left_padded": left_padded_case,
    "sdar.training_packed": packed_case,
    "sdar.decode_last_block": decode_case,
    **dict.fromkeys(["e2d2.decoder", "megatron.two_tower_denoiser"], two_tower_case),
    **dict.fromkeys(["e2d2.decoder_with_padding", "e2d2.encoder_with_context"], right_padded_case),
    **dict.fromkeys([name for name in PATTERNS if name.startswith("automodel.")], gemma_training_case),
    **dict.fromkeys([name for name in PATTERNS if name.startswith("diffusion_gemma.")], gemma_decode_case),
    **dict.fromkeys(
        ["bd3lm.sampling_without_cache", "e2d2.encoder", "llada2.window", "sdar.prefill"], block_causal_case
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=12)
@given(data=st.data())
def test_the_pattern_with_other_parameters(name, data):
    parameters, mask, tensors = MAKERS.get(name, training_case)(name, data.draw)
    system, pattern = name.split(".")
    case = {"system": system, "pattern": pattern, "parameters": parameters, "file": "mask.safetensors"}
    with tempfile.TemporaryDirectory() as folder:
        save_file({"mask": mask} | tensors, Path(folder) / case["file"])
        assert replay(case | {"q_len": mask.shape[1], "k_len": mask.shape[2]}, Path(folder), block_attention) is None
