"""TwoTower: a frozen autoregressive context tower and a trained block denoiser (Nemotron-TwoTower, arXiv 2606.26493).

Both towers are the same hybrid stack of Mamba-2 (`M`), attention (`*`), mixture-of-experts (`E`) and dense MLP (`-`)
layers, with separate weights. The context tower runs causally over clean tokens and leaves a `ContextState` behind; the
denoiser reads, at every layer, the same layer's part of that state, and never writes it:

    context   h ← h + mixer(norm(h))
    denoiser  h ← h + gate · mixer(norm(h·(1+scale) + shift))       M and *
              h ← h + gate · mixer(norm(h)·(1+scale) + shift)       E and -

Attribute names are the checkpoint's keys. No position information exists anywhere: per-row lengths are all that a
ragged batch needs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twotower_kernels.options.config import TwoTowerConfig
from twotower_kernels.reference import checkpoint
from twotower_kernels.reference.adaln import adaln_norm, gated_residual, rms_norm
from twotower_kernels.reference.attention import append_kv
from twotower_kernels.reference.layers import TimeEmbedder, Tower

# These parameters keep their file's dtype, or a wider one: selection and decay are sensitive to their rounding.
NEVER_NARROWED = ("gate.weight", "e_score_correction_bias", "A_log", "mixer.D", "dt_bias")

BACKBONE = ("backbone.", "model.")  # how the keys of a single tower begin: in files, and in transformers' own modules


@dataclass(frozen=True)
class ContextState:
    """What the context tower leaves behind, per layer index, for B rows. States are values: no method changes one.

    lengths: `[B]` int64, committed tokens. k, v: `[B, T, Hkv, D]` with T ≥ max(lengths), beyond `lengths` unspecified.
    conv: `[B, C, width-1]`. ssm: `[B, heads, head_dim, state]` float32. last_hidden: `[B, H]`, of the last token.
    kv_index: `[B]`, which row of `k`, `v` each row reads (None: its own), so that many blocks can share one context.
    """

    lengths: Tensor
    k: dict[int, Tensor]
    v: dict[int, Tensor]
    conv: dict[int, Tensor]
    ssm: dict[int, Tensor]
    last_hidden: Tensor
    head: Tensor
    kv_index: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def logits(self) -> Tensor:
        """Next-token logits of the context tower `[B, V]` float32, computed when asked for.

        Raises:
            ValueError: a row has no token yet.
        """
        if bool((self.lengths == 0).any()):
            raise ValueError(
                f"state.logits: expected at least one token in every row, got lengths {self.lengths.tolist()}"
            )
        return _logits(self.last_hidden, self.head)

    def select(self, rows: Tensor | Sequence[int]) -> "ContextState":
        """Keeps some rows, in the order given (indices `[N]`, or a boolean mask `[B]`)."""
        rows = torch.as_tensor(rows, device=self.lengths.device)
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows.long()

        def pick(tensors: dict[int, Tensor]) -> dict[int, Tensor]:
            return {i: t[rows] for i, t in tensors.items()}

        shared = self.kv_index is not None
        return replace(
            self,
            lengths=self.lengths[rows],
            k=self.k if shared else pick(self.k),
            v=self.v if shared else pick(self.v),
            conv=pick(self.conv),
            ssm=pick(self.ssm),
            last_hidden=self.last_hidden[rows],
            kv_index=None if self.kv_index is None else self.kv_index[rows],
        )

    def fork(self, n: int) -> "ContextState":
        """Repeats every row n times, copies next to each other: n continuations of each context."""
        if n < 1:
            raise ValueError(f"fork: expected at least 1 copy, got {n}")
        return self.select(torch.arange(self.batch_size, device=self.lengths.device).repeat_interleave(n))


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    logits = F.linear(hidden, head)
    return logits if logits.dtype == torch.float64 else logits.float()


class TwoTower(nn.Module):
    """Both towers, their heads, and the denoiser's time conditioning."""

    def __init__(self, config: TwoTowerConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.context_tower, self.denoiser_tower = Tower(config), Tower(config)
        self.context_lm_head = nn.Linear(hidden, config.vocab_size, bias=False)
        self.lm_head = nn.Linear(hidden, config.vocab_size, bias=False)
        self.t_embedder = TimeEmbedder(hidden)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 3 * hidden))
        self.scale_shift_tables = nn.ParameterList(
            torch.randn(3, hidden) / hidden**0.5 for _ in config.hybrid_override_pattern
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None) -> "TwoTower":
        """Loads a folder with `config.json` and safetensors in the released key layout.

        A single-tower checkpoint of the backbone (`backbone.*`, `lm_head.weight`), as transformers saves it, seeds both
        towers.

        Args:
            folder: holds `model.safetensors`, or shards and their index.
            dtype: of the weights; None: the config's `torch_dtype`. Router, A_log, D, dt_bias never get narrower than
                in the file.

        Raises:
            FileNotFoundError, ValueError: naming the file, key or config field at fault.
        """
        folder = Path(folder)
        config = TwoTowerConfig.from_file(folder / "config.json")
        listed = checkpoint.listed(folder)
        from_backbone = any(key.startswith(BACKBONE) for key in listed)
        _check_count(config, listed, 1 if from_backbone else 2, folder)
        model = cls(config)
        if dtype is None:
            dtype = _most_common(listed) if config.torch_dtype == "auto" else getattr(torch, config.torch_dtype)
        waiting = set(model.state_dict())
        if from_backbone:  # time conditioning is not in such a checkpoint: it stays as initialised
            model.to(dtype)
            waiting = {name for name in waiting if name.startswith(("context_", "denoiser_", "lm_head"))}
        known = set(waiting)
        for key, tensor in _one_by_one(checkpoint.tensors(folder)):
            for name in _parameter_names(key, from_backbone):
                if name not in known:
                    raise ValueError(f"{folder}: key {checkpoint.named(key)} is not part of this model")
                if name not in waiting:
                    raise ValueError(f"{folder}: key {key} was already given under another spelling")
                waiting.discard(name)
                model._assign(name, tensor, dtype, folder, key)
        if waiting:
            raise ValueError(f"{folder}: key {min(waiting)} is missing ({len(waiting)} keys in all)")
        return model

    def _assign(self, name: str, tensor: Tensor, dtype: torch.dtype, folder: Path, key: str) -> None:
        owner, _, leaf = name.rpartition(".")
        old = self.get_parameter(name)
        if tensor.shape != old.shape:
            raise ValueError(f"{folder}: key {key} has shape {list(tensor.shape)}, expected {list(old.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{folder}: key {key} has dtype {tensor.dtype}, expected a floating one")
        if name.endswith(NEVER_NARROWED):
            dtype = torch.promote_types(tensor.dtype, dtype)
        # A clone, because a backbone's tensor goes to both towers.
        new = nn.Parameter(tensor.to(dtype).clone(), requires_grad=old.requires_grad)
        self.get_submodule(owner).register_parameter(leaf, new)

    def empty_state(self, batch: int) -> ContextState:
        """A state of length 0: legal wherever a state is."""
        c, head = self.config, self.context_lm_head.weight
        acc_dtype = torch.float64 if head.dtype == torch.float64 else torch.float32
        attention = [i for i, letter in enumerate(c.hybrid_override_pattern) if letter == "*"]
        mamba = [i for i, letter in enumerate(c.hybrid_override_pattern) if letter == "M"]
        ssm = (batch, c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size)
        return ContextState(
            lengths=torch.zeros(batch, dtype=torch.int64, device=head.device),
            k={i: head.new_zeros(batch, 0, c.num_key_value_heads, c.head_dim) for i in attention},
            v={i: head.new_zeros(batch, 0, c.num_key_value_heads, c.head_dim) for i in attention},
            conv={i: head.new_zeros(batch, c.mamba_channels, c.conv_kernel - 1) for i in mamba},
            ssm={i: head.new_zeros(ssm, dtype=acc_dtype) for i in mamba},
            last_hidden=head.new_zeros(batch, c.hidden_size),
            head=head,
        )

    def context_pass(
        self, ids: Tensor, state: ContextState, lengths: Tensor | None = None, states_every: int = 0
    ) -> tuple[Tensor, ContextState]:
        """The context tower over `ids [B, S]` from `state`: hidden `[B, S, H]` after `norm_f`, and the new state.

        With `states_every`, `conv` and `ssm` of the new state are those after every so many tokens, `[B, N, ...]`.
        """
        ids = self._checked_ids(ids)
        if ids.shape[0] != state.batch_size or state.kv_index is not None:
            raise ValueError(f"ids: expected {state.batch_size} rows of an unshared state, got {ids.shape[0]}")
        c, tower = self.config, self.context_tower
        ragged = lengths is not None
        lengths = torch.full(ids.shape[:1], ids.shape[1], device=ids.device) if lengths is None else lengths.long()
        if lengths.shape != ids.shape[:1] or ((lengths < 0) | (lengths > ids.shape[1])).any():
            raise ValueError(f"lengths: expected [{ids.shape[0]}] values in 0..{ids.shape[1]}, got {lengths.tolist()}")
        k_all, v_all, conv, ssm = dict(state.k), dict(state.v), dict(state.conv), dict(state.ssm)
        h = self._embed(tower, ids)
        for i, layer in enumerate(tower.layers):
            x = rms_norm(h, layer.norm.weight, eps=c.layer_norm_epsilon).to(tower.embeddings.weight.dtype)
            if layer.letter == "M":
                y, conv[i], ssm[i] = layer.mixer(x, conv[i], ssm[i], lengths if ragged else None, states_every)
            elif layer.letter == "*":
                y, k, v = layer.mixer(x, k_all[i], v_all[i], state.lengths, None, lengths, causal=True)
                k_all[i], v_all[i] = _appended(k_all[i], v_all[i], k, v, state.lengths, lengths)
            else:
                y = layer.mixer(x)
            h = gated_residual(h, y)
        hidden = rms_norm(h, tower.norm_f.weight, eps=c.layer_norm_epsilon).to(tower.embeddings.weight.dtype)
        last = state.last_hidden
        if ids.shape[1]:
            newest = hidden[torch.arange(len(ids), device=ids.device), (lengths - 1).clamp(min=0)]
            last = torch.where(lengths[:, None] > 0, newest, last)
        new = replace(state, lengths=state.lengths + lengths, k=k_all, v=v_all, conv=conv, ssm=ssm, last_hidden=last)
        return hidden, new

    def forward_ar(self, ids: Tensor) -> Tensor:
        """The context tower alone over clean tokens `[B, S]`: next-token logits `[B, S, V]` float32."""
        hidden, _ = self.context_pass(ids, self.empty_state(len(ids)))
        return _logits(hidden, self.context_lm_head.weight)

    def prefill(self, ids: Tensor, lengths: Tensor | None = None) -> ContextState:
        """The state after prompts `[B, S]`, of which row b has `lengths[b]` tokens (all, if None)."""
        return self.commit(ids, self.empty_state(len(ids)), lengths)

    def commit(self, block_ids: Tensor, state: ContextState, lengths: Tensor | None = None) -> ContextState:
        """`state` extended by the first `lengths[b]` clean tokens of each row of `block_ids [B, S]` (all, if None)."""
        return self.context_pass(block_ids, state, lengths)[1]

    def denoise(self, block_ids: Tensor, state: ContextState, t: Tensor | float | None = None) -> Tensor:
        """The denoiser on one partly masked block per row: logits `[B, S, V]` float32 for every position.

        Args:
            block_ids: `[B, S]`, masks included.
            state: the context; read only.
            t: the noise level in [0, 1], a number or `[B]` (for ranking policies the masked fraction); None: without
                time conditioning, so that the tower computes as the context tower does.
        """
        block_ids = self._checked_ids(block_ids)
        if len(block_ids) != state.batch_size:
            raise ValueError(f"block_ids: expected {state.batch_size} rows as the state has, got {len(block_ids)}")
        c, tower = self.config, self.denoiser_tower
        h = self._embed(tower, block_ids)
        for i, (layer, (shift, scale, gate)) in enumerate(
            zip(tower.layers, self._modulation(t, block_ids), strict=True)
        ):
            order = "modulate_norm" if layer.letter in "M*" else "norm_modulate"
            x = adaln_norm(h, layer.norm.weight, shift, scale, eps=c.layer_norm_epsilon, order=order)
            x = x.to(tower.embeddings.weight.dtype)
            if layer.letter == "M":
                y = layer.mixer(x, state.conv[i], state.ssm[i])[0]
            elif layer.letter == "*":
                y = layer.mixer(x, state.k[i], state.v[i], state.lengths, state.kv_index)[0]
            else:
                y = layer.mixer(x)
            h = gated_residual(h, y, gate)
        hidden = rms_norm(h, tower.norm_f.weight, eps=c.layer_norm_epsilon).to(tower.embeddings.weight.dtype)
        return _logits(hidden, self.lm_head.weight)

    def _modulation(self, t: Tensor | float | None, ids: Tensor) -> Iterator[tuple[Tensor | None, ...]]:
        """Per layer (shift, scale, gate), each `[B, H]`; all None without time (adaLN-single, arXiv 2310.00426)."""
        if t is None:
            yield from [(None, None, None)] * len(self.scale_shift_tables)
            return
        t = torch.as_tensor(t, device=ids.device)
        if t.dim() == 0:
            t = t.expand(len(ids))
        if t.shape != ids.shape[:1] or not ((t >= 0) & (t <= 1)).all():
            raise ValueError(f"t: expected a number or [{len(ids)}] numbers in [0, 1], got {t.tolist()}")
        shared = self.t_block(self.t_embedder(t)).unflatten(-1, (3, -1))  # [B, 3, H]
        for table in self.scale_shift_tables:
            yield (shared + table).unbind(1)

    def _embed(self, tower: Tower, ids: Tensor) -> Tensor:
        h = tower.embeddings(ids)
        return h.float() if self.config.residual_in_fp32 and h.dtype != torch.float64 else h

    def _checked_ids(self, ids: Tensor) -> Tensor:
        """int64 [B, S]."""
        if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"ids: expected integers [B, S], got {ids.dtype} {tuple(ids.shape)}")
        ids = ids.long()
        wrong = (ids < 0) | (ids >= self.config.vocab_size)
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"ids: token {int(ids[row, column])} at row {row}, position {column} is outside the vocabulary "
                f"of {self.config.vocab_size}"
            )
        return ids


def numbers(config: TwoTowerConfig) -> int:
    """How many numbers one tower and its head have: counted, so that a file can be asked whether it holds them."""
    hidden, pattern = config.hidden_size, config.hybrid_override_pattern
    convolution = config.mamba_channels * (config.conv_kernel + config.use_conv_bias)
    projections = 2 * config.mamba_inner + config.mamba_channels + config.mamba_num_heads  # of in_proj and out_proj
    shared = config.moe_shared_expert_intermediate_size if config.n_shared_experts else 0
    mixers = {
        "M": projections * hidden + convolution + 3 * config.mamba_num_heads + config.mamba_inner,
        "*": 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim * hidden,
        "E": config.n_routed_experts * ((2 * config.moe_intermediate_size + 1) * hidden + 1) + 2 * shared * hidden,
        "-": 2 * config.intermediate_size * hidden,
    }
    layers = sum(pattern.count(letter) * (hidden + mixers[letter]) for letter in set(pattern))
    return 2 * config.vocab_size * hidden + hidden + layers


def _check_count(config: TwoTowerConfig, listed: dict[str, tuple[str, int]], towers: int, folder: Path) -> None:
    """Refuses a config that asks for many times the numbers that the files hold, before any of them is allocated.

    Raises:
        ValueError: it does. (What is wrong in particular is said of a model that is about as large as its files.)
    """
    held, wanted = sum(count for _, count in listed.values()), towers * numbers(config)
    if wanted > 8 * held:
        raise ValueError(
            f"{folder}: a config of model_type {config.model_type!r} with vocab_size {config.vocab_size}, hidden_size "
            f"{config.hidden_size}, {len(config.hybrid_override_pattern)} layers and {config.n_routed_experts} experts "
            f"asks for {wanted} numbers, but the files hold {held}"
        )


def _most_common(listed: dict[str, tuple[str, int]]) -> torch.dtype:
    """The dtype that most of a checkpoint's floating numbers have."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    counts = {dtype: sum(n for kind, n in listed.values() if kind == word) for word, dtype in dtypes.items()}
    return max(counts, key=counts.__getitem__)


def _one_by_one(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """transformers' own modules hold a layer's experts in one tensor: it is handed out expert by expert."""
    for key, tensor in tensors:
        if key.endswith((".experts.up_proj", ".experts.down_proj")):
            prefix, _, projection = key.rpartition(".")
            for i, expert in enumerate(tensor):
                yield f"{prefix}.{i}.{projection}.weight", expert
        else:
            yield key, tensor


def _parameter_names(key: str, from_backbone: bool) -> list[str]:
    """The parameters that a checkpoint key fills: one, or one in each tower for a backbone checkpoint."""
    key = key.replace("embedding.weight", "embeddings.weight")
    if key.startswith(BACKBONE):
        rest = key.partition(".")[2]
        return [f"context_tower.{rest}", f"denoiser_tower.{rest}"]
    if from_backbone and key == "lm_head.weight":
        return ["context_lm_head.weight", "lm_head.weight"]
    return [key]


def _appended(k_old: Tensor, v_old: Tensor, k: Tensor, v: Tensor, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of `[B, T, Hkv, D]` storage with each row's first `new[b]` tokens written at `old[b]`."""
    needed = int((old + new).max()) if len(old) else 0
    grow = [0, 0, 0, 0, 0, max(0, needed - k_old.shape[1])]
    k_new, v_new = F.pad(k_old, grow).clone(), F.pad(v_old, grow).clone()
    append_kv(k_new, v_new, k.detach(), v.detach(), old, block_lens=new)  # what the context leaves is frozen
    return k_new, v_new
