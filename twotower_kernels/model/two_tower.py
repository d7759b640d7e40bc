"""TwoTower for inference: a causal context tower, and a denoiser that reads its state layer by layer.

Both towers (Nemotron-TwoTower, arXiv 2606.26493) are the same stack of Mamba-2 (`M`), attention (`*`), mixture of
experts (`E`) and dense MLP (`-`) layers, with separate weights:

    context tower   h ← h + mixer(norm(h))                           causal; leaves a `ContextState` behind
    denoiser        h ← h + gate · mixer(norm(h·(1+scale) + shift))  M and *; reads that state, never writes it
                    h ← h + gate · mixer(norm(h)·(1+scale) + shift)  E and -

One layer's residual and the next layer's norm are one operation. No position information exists: a batch of rows of
different lengths needs nothing but the lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twotower_kernels.model import checkpoint, loading
from twotower_kernels.model.cache import Cache, MambaCache, MambaState
from twotower_kernels.model.generate import generate, stream
from twotower_kernels.model.inference import inference
from twotower_kernels.model.layers import Factory, Linear, Stacked, TimeEmbedder, Tower, draw_weights
from twotower_kernels.model.layout import Layout
from twotower_kernels.model.memory import check_room
from twotower_kernels.model.ranges import in_range, profiled
from twotower_kernels.model.state import BlockLook, BlockRead, ContextState, Memory, Scanned, logits, newest
from twotower_kernels.model.verification import Verification
from twotower_kernels.ops import adaln_norm, gated_residual_adaln_norm
from twotower_kernels.options.arguments import Integers, integers, readable, real, whole
from twotower_kernels.options.config import TwoTowerConfig

TOWERS = ("both", "context", "denoiser")
Modulation = tuple[Tensor | None, Tensor | None, Tensor | None]  # shift, scale, gate, each [B, H]


class TwoTowerModel(nn.Module):
    """Both towers or one of them, without gradients. Use `from_pretrained`; the constructor draws random weights.

    `state_dict` and `load_state_dict` speak the released checkpoint's keys, although experts are stored stacked.

    Args:
        config: the shape of both towers.
        device: of the weights.
        context_device, denoiser_device: of one tower's weights; None: `device`. The denoiser's device then holds a copy
            of the context, to which each commit sends what is new. Token ids may be on either device. Both towers on
            one device share one state.
        dtype: of the weights; None: the config's `torch_dtype`. Router, A_log, D and dt_bias are float32 at least.
        towers: "both"; "context" (runs alone autoregressively, and makes states); "denoiser" (reads states).

    Raises:
        ValueError: unknown `towers`; a device that is not there, or that is for a tower not asked for; weights that
            need more than all of a device's memory.
        TypeError: a dtype that is not float64, float32, bfloat16 or float16.
    """

    @torch.inference_mode(False)  # parameters made in inference mode could not be loaded into later
    def __init__(
        self,
        config: TwoTowerConfig,
        *,
        device: torch.device | str = "cpu",
        context_device: torch.device | str | None = None,
        denoiser_device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        towers: str = "both",
    ) -> None:
        super().__init__()
        devices = _devices(towers, device, context_device, denoiser_device)
        self.config, self.towers = config, towers
        weights = loading.weight_dtype(config, dtype)
        check_room(Layout(config, towers), weights, devices)
        factory: Factory = {"device": devices["context"], "dtype": weights}
        hidden, layers = config.hidden_size, len(config.hybrid_override_pattern)
        if towers != "denoiser":
            self.context_tower = Tower(config, factory)
            self.context_lm_head = Linear(hidden, config.vocab_size, **factory)
        if towers != "context":
            factory = factory | {"device": devices["denoiser"]}
            self.denoiser_tower = Tower(config, factory)
            self.lm_head = Linear(hidden, config.vocab_size, **factory)
            self.t_embedder = TimeEmbedder(hidden, factory)
            self.t_block = nn.Sequential(nn.SiLU(), Linear(hidden, 3 * hidden, bias=True, **factory))
            tables = torch.empty(layers, 3, hidden, **factory)
            self.scale_shift_tables: Any = Stacked({"tables": "{}"}, tables=tables)
        self.requires_grad_(False)
        if not any(p.is_meta for p in self.parameters()):
            draw_weights(self)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        context_device: torch.device | str | None = None,
        denoiser_device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        towers: str = "both",
        progress: bool | None = None,
    ) -> TwoTowerModel:
        """Loads a folder with `config.json` and safetensors in the released layout, one file or shards.

        Every weight goes from its file straight to its parameter on the device, in its dtype; nothing is held twice.
        A single-tower checkpoint of the backbone (`backbone.*`, `lm_head.weight`), as transformers saves it, fills both
        towers. The time conditioning that it lacks is set to none: `denoise` then gives the same for every t. Layers
        for multi-token prediction are passed over with a warning (docs/checkpoints.md).

        Args:
            path: the folder.
            device, context_device, denoiser_device, dtype, towers: as for the class, except that router, A_log, D and
                dt_bias keep their file's dtype if it is the wider one. Weights of a tower that is not asked for are
                not read.
            progress: whether to show a bar on stderr; None: for more than 1 GB, if stderr is a terminal.

        Raises:
            FileNotFoundError: config, weights or a shard missing.
            ValueError: as for the class; a config, index or file that is damaged or hostile; a key missing, unknown,
                given twice, or of the wrong shape or dtype. The message names file and key. All keys are checked before
                any is read.
        """
        devices = _devices(towers, device, context_device, denoiser_device)
        config = TwoTowerConfig.from_file(Path(path) / "config.json")
        plan = loading.plan(Path(path), checkpoint.entries(path), config, towers, dtype)
        check_room(plan.layout, plan.dtype, devices)
        model = cls(config, device="meta", dtype=plan.dtype, towers=towers)
        loading.fill(model, plan, devices, progress, name=Path(path).name)
        return model

    @property
    def device(self) -> torch.device:
        """Where the weights are, of two towers the context tower's."""
        return (self.lm_head if self.towers == "denoiser" else self.context_lm_head).weight.device

    @property
    def denoiser_device(self) -> torch.device:
        """Where the denoiser's weights are; for a context tower alone: `device`."""
        return self.device if self.towers == "context" else self.lm_head.weight.device

    # --- the context tower ------------------------------------------------------------------------------------------

    @inference
    def forward_ar(self, input_ids: Integers) -> Tensor:
        """The context tower alone, as a causal language model over clean tokens.

        Args:
            input_ids: `[B, S]`, integers of any dtype: a tensor, an array or lists.

        Returns:
            Next-token logits of every position, `[B, S, V]` float32 (float64 for a float64 model). Not differentiable.

        Raises:
            ValueError: ids of the wrong shape, dtype, device, or outside the vocabulary. RuntimeError: no such tower.
        """
        self._need("context")
        input_ids = self._checked_ids("input_ids", input_ids, self.device)

        hidden, _ = self._run("context_tower", input_ids, lambda layer: None)
        return logits(hidden, self.context_lm_head.weight)

    def prefill(self, input_ids: Integers, lengths: Integers | None = None) -> ContextState:
        """The state after prompts `[B, S]`, of which row b has its first `lengths[b]` tokens (all, if None).

        What stands beyond a row's length is ignored, but must be in the vocabulary. Raises as `commit`.
        """
        self._need("context")
        input_ids = self._checked_ids("input_ids", input_ids, self.device)
        return self.commit(input_ids, self.empty_state(input_ids.shape[0]), lengths)

    def commit(self, block_ids: Integers, state: ContextState, lengths: Integers | None = None) -> ContextState:
        """Extends the context by clean tokens, and consumes `state`: keys and values are appended in place.

        Args:
            block_ids: `[B, S]`, integers of any dtype: a tensor, an array or lists; S may be 0.
            state: the context of B rows. Any later use of it is a RuntimeError (its forks and selections stay valid).
                When this call raises, the state is unchanged and stays usable.
            lengths: `[B]`, integers of any dtype, how many tokens of each row count, 0 to S; None: all.

        Returns:
            The new state. Not differentiable.

        Raises:
            ValueError: ids or lengths of the wrong shape, dtype, device or range. RuntimeError: a state that was
                consumed, no such tower.
        """
        return self.commit_by(self.read_block, block_ids, state, lengths)

    @inference
    def commit_by(
        self,
        read: Callable[[Tensor, ContextState, Any], BlockRead],
        block_ids: Integers,
        state: ContextState,
        lengths: Integers | None = None,
    ) -> ContextState:
        """`commit`, with `read` instead of `read_block`."""
        self._need("context")
        block_ids = self._checked_ids("block_ids", block_ids, self.device, state)
        batch, size = block_ids.shape
        if lengths is not None:
            lengths = self._checked_lengths(lengths, batch, size)
        if size:
            old = state.room_for(size)
            new = old.advanced(size, lengths, read(block_ids, old, lengths))
        else:
            new = state.replaced()
        state.consume()
        return new

    def read_block(self, block_ids: Tensor, state: ContextState, lengths: Tensor | None) -> BlockRead:
        """What the context tower makes of a block `[B, S]`, S at least 1, of which `lengths` tokens count (None: all).

        Keys and values are appended to the state, which has room for them; nothing else of it is written.
        """
        # hidden [B, S, H]; states: of every Mamba-2 layer
        hidden, states = self._run("context_tower", block_ids, partial(state.extended_by, block_lens=lengths))
        # A copy, so as not to keep all of `hidden`.
        last = hidden[:, -1].clone() if lengths is None else newest(hidden, lengths, state.last_hidden)
        conv, ssm = ({i: state[part] for i, state in states.items()} for part in (0, 1))
        return BlockRead(conv, ssm, last)

    def verify(self, block_ids: Integers, state: ContextState) -> Verification:
        """Reads a block of which it will be known from what is said here how many tokens count: the first half of a
        commit, `accept` is the second. Consumes `state`, as `commit` does.

        Args:
            block_ids: `[B, S]`, integers of any dtype: a tensor, an array or lists; S at least 1.
            state: the context of B rows.

        Returns:
            A `Verification`, whose `logits` `[B, S, V]` say what the context tower would write behind each token. On a
            CPU, for S up to 64, they are to the bit those that it has after commits of one token. Not differentiable.

        Raises:
            ValueError: ids of the wrong shape, dtype, device or range. RuntimeError: a state that was consumed, no such
                tower.
        """
        return self.verify_by(self.look_at_block, block_ids, state)

    @inference
    def verify_by(
        self, look: Callable[[Tensor, ContextState], BlockLook], block_ids: Integers, state: ContextState
    ) -> Verification:
        """`verify`, with `look` instead of `look_at_block`."""
        self._need("context")
        block_ids = self._checked_ids("block_ids", block_ids, self.device, state)
        if not block_ids.shape[1]:
            raise ValueError("block_ids: expected at least one token per row, got [B, 0]")
        old = state.room_for(block_ids.shape[1])
        look_at = look(block_ids, old)
        if old is state:
            old = state.replaced()
        state.consume()
        return Verification(old, look_at)

    def look_at_block(self, block_ids: Tensor, state: ContextState) -> BlockLook:
        """What the context tower makes of a block `[B, S]`, S at least 1, without a word on how many tokens count.

        Keys and values are left behind the context's; nothing else of it is written.
        """
        scanned: dict[int, Scanned] = {}
        hidden, _ = self._run("context_tower", block_ids, partial(state.looked_into_by, scanned=scanned))
        return BlockLook(logits(hidden, self.context_lm_head.weight), hidden, scanned)

    def accept(self, verification: Verification, lengths: Integers) -> ContextState:
        """Extends the context by what counts of a block that was verified: no layer but Mamba-2's scans reads it again.

        Args:
            verification: what `verify` returned. Any later use of it is a RuntimeError.
            lengths: `[B]`, integers of any dtype, how many tokens of each row count, 0 to S.

        Returns:
            The state that `commit` of the same tokens returns, on a CPU to the bit for S up to 64. Not differentiable.

        Raises:
            ValueError: lengths of the wrong shape, dtype or range. RuntimeError: a verification that was accepted.
        """
        return self.accept_by(self.replay_block, verification, lengths)

    @inference
    def accept_by(
        self,
        replay: Callable[[BlockLook, ContextState, Tensor], BlockRead],
        verification: Verification,
        lengths: Integers,
    ) -> ContextState:
        """`accept`, with `replay` instead of `replay_block`."""
        old, look = verification.pending()
        batch, size = look.hidden.shape[:2]
        lengths = self._checked_lengths(lengths, batch, size)
        new = old.advanced(size, lengths, replay(look, old, lengths))
        old.consume()
        return new

    def replay_block(self, look: BlockLook, state: ContextState, lengths: Tensor) -> BlockRead:
        """What the context tower leaves behind the tokens that count of a block it has looked at."""
        conv, ssm = self.replay_scans(look.scanned, state, lengths)
        return BlockRead(conv, ssm, newest(look.hidden, lengths, state.last_hidden))

    def replay_scans(
        self, scanned: dict[int, Scanned], state: ContextState, lengths: Tensor
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """`conv` and `ssm` behind the tokens that count, from before the block and what was scanned of it."""
        conv, ssm = {}, {}
        for i, (xbc, dt) in scanned.items():
            cache = MambaCache(state.conv[i], state.ssm[i], None, lengths, return_state=True)
            conv[i], ssm[i] = self.context_tower.layers[i].mixer.scan(xbc, dt, cache)[1]
        return conv, ssm

    @inference
    def empty_state(self, batch: int) -> ContextState:
        """The state of `batch` rows without any token: legal wherever a state is, except for its logits.

        Raises:
            ValueError: a negative batch.
        """
        batch = whole("batch", batch)
        if batch < 0:
            raise ValueError(f"batch: expected 0 or more rows, got {batch}")
        if self.towers == "denoiser":
            return self._empty_state(batch, self.lm_head.weight)
        head = self.context_lm_head.weight
        mirror = None if self.denoiser_device == self.device else self._empty_state(batch, self.lm_head.weight)
        return self._empty_state(batch, head).replaced(head=head, mirror=mirror)

    def _empty_state(self, batch: int, like: Tensor) -> ContextState:
        c, state_dtype = self.config, torch.promote_types(like.dtype, torch.float32)
        kv = (batch, 0, c.num_key_value_heads, c.head_dim)
        ssm = (batch, c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size)
        return ContextState(
            lengths=torch.zeros(batch, dtype=torch.int64, device=like.device),
            k={i: like.new_empty(kv) for i in c.layers("*")},
            v={i: like.new_empty(kv) for i in c.layers("*")},
            conv={i: like.new_zeros(batch, c.mamba_channels, c.conv_kernel - 1) for i in c.layers("M")},
            ssm={i: like.new_zeros(ssm, dtype=state_dtype) for i in c.layers("M")},
            last_hidden=like.new_zeros(batch, c.hidden_size),
            head=None,
            index=None,
            longest=0,
            kv_memory=Memory(),  # which a trace does not make by itself
            mamba_memory=Memory(),
        )

    # --- the denoiser -----------------------------------------------------------------------------------------------

    @inference
    def denoise(self, block_ids: Integers, state: ContextState, t: Tensor | float | None = None) -> Tensor:
        """The denoiser on one partly masked block per row. The context is read where it lies: nothing of it is copied.

        Args:
            block_ids: `[B, S]`, integers of any dtype, masks included: a tensor, an array or lists.
            state: the context of B rows; only read.
            t: noise level in [0, 1], a number or `[B]` (for rules that rank: the masked fraction). None: no
                time conditioning, the tower then computes as the context tower does.

        Returns:
            Logits of every position, `[B, S, V]` float32 (float64 for a float64 model). Not differentiable.

        Raises:
            ValueError: ids or t of the wrong shape, dtype, device or range. RuntimeError: a state that was consumed,
                no such tower.
        """
        self._need("denoiser")
        block_ids = self._checked_ids("block_ids", block_ids, self.denoiser_device, state)
        modulation = self._modulation(t, block_ids)
        hidden, _ = self._run("denoiser_tower", block_ids, state.for_denoiser.read_by, modulation)
        return logits(hidden, self.lm_head.weight)

    def _modulation(self, t: Tensor | float | None, ids: Tensor) -> list[Modulation] | None:
        """Per layer (shift, scale, gate), by adaLN-single (PixArt-α, arXiv 2310.00426): a shared part and a table."""
        if t is None:
            return None
        batch = ids.shape[0]
        if not isinstance(t, Tensor):
            number = real("t", t, "a number, or a tensor of them")
            if not 0 <= number <= 1:  # NaN fails too
                raise ValueError(f"t: expected a number in [0, 1], got {number}")
            # A sum, for the sake of torch.compile: it would make a graph for each number that `full` is given.
            t = torch.zeros(batch, dtype=torch.float64, device=ids.device).add(number)
        elif (t.ndim and t.shape != (batch,)) or not t.is_floating_point():
            raise ValueError(f"t: expected floating numbers, one or [{batch}], got {t.dtype} {list(t.shape)}")
        elif readable(t) and not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError(f"t: expected numbers in [0, 1], got {t.tolist()}")
        self._check_device("t", t)
        shared = self.t_block(self.t_embedder(t.to(ids.device).expand(batch))).unflatten(-1, (3, -1))  # [B, 3, H]
        modulation = self.scale_shift_tables.tables[:, None] + shared  # [layers, B, 3, H]
        return list(zip(*(part.unbind() for part in modulation.unbind(2)), strict=True))

    # --- generation -------------------------------------------------------------------------------------------------

    generate = generate
    stream = stream

    # --- both towers ------------------------------------------------------------------------------------------------

    def _run(
        self,
        tower: str,
        ids: Tensor,
        cache: Callable[[int], Cache],
        modulation: list[Modulation] | None = None,
    ) -> tuple[Tensor, dict[int, MambaState]]:
        """The residual stream through a tower: `[B, S, H]` after the last norm, and the states that layers leave."""
        if not profiled():
            return self._pass(tower, False, ids, cache, modulation)
        return in_range(tower, self._pass)(tower, True, ids, cache, modulation)

    def _pass(
        self,
        name: str,
        with_ranges: bool,
        ids: Tensor,
        cache: Callable[[int], Cache],
        modulation: list[Modulation] | None,
    ) -> tuple[Tensor, dict[int, MambaState]]:
        """`_run`, with a range for each mixer or without."""
        tower: Tower = getattr(self, name)
        eps, dtype = self.config.layer_norm_epsilon, tower.embeddings.weight.dtype
        layers = list(tower.layers)
        each: list[Modulation] = [(None, None, None)] * len(layers) if modulation is None else modulation
        # Per norm: weight, shift, scale, order. The last one is never modulated.
        norms = [(layer.norm.weight, *m[:2], layer.order) for layer, m in zip(layers, each, strict=True)]
        norms.append((tower.norm_f.weight, None, None, "modulate_norm"))
        states: dict[int, MambaState] = {}
        h = tower.embeddings(ids)
        if self.config.residual_in_fp32:
            h = h.to(torch.promote_types(dtype, torch.float32))
        weight, shift, scale, order = norms[0]
        x = adaln_norm(h, weight, shift, scale, eps=eps, order=order)
        for i, layer in enumerate(layers):
            mixer = layer.mixer
            if with_ranges:
                mixer = in_range(f"{name}.layers.{i}.mixer {type(mixer).__name__}", mixer)
            y, state = mixer(x.to(dtype), cache(i))
            if state is not None:
                states[i] = state
            weight, shift, scale, order = norms[i + 1]
            h, x = gated_residual_adaln_norm(h, y, each[i][2], weight, shift, scale, eps=eps, order=order)
        return x.to(dtype), states

    def _need(self, tower: str) -> None:
        if self.towers not in ("both", tower):
            raise RuntimeError(f"expected a model with the {tower} tower, got one loaded with towers={self.towers!r}")

    def _check_device(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self.device and tensor.device != self.denoiser_device:
            other = "" if self.denoiser_device == self.device else f" or {self.denoiser_device}"
            raise ValueError(f"{name}: expected device {self.device}{other}, got {tensor.device}")

    def _checked_ids(self, name: str, ids: Integers, device: torch.device, state: ContextState | None = None) -> Tensor:
        """The ids on the device of the tower that reads them; they come from either."""
        ids = integers(name, ids, device)
        if ids.ndim != 2 or ids.dtype != torch.int64:
            raise ValueError(f"{name}: expected integers [B, S], got {ids.dtype} {list(ids.shape)}")
        if state is not None and ids.shape[0] != state.batch_size:
            raise ValueError(f"{name}: expected {state.batch_size} rows as the state has, got {ids.shape[0]}")
        self._check_device(name, ids)
        vocabulary = self.config.vocab_size
        if readable(ids) and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            row, column = ((ids < 0) | (ids >= vocabulary)).nonzero()[0].tolist()
            raise ValueError(
                f"{name}: token {int(ids[row, column])} at row {row}, position {column} is outside the vocabulary "
                f"of {vocabulary}"
            )
        return ids.to(device)

    def _checked_lengths(self, lengths: Integers, batch: int, size: int) -> Tensor:
        lengths = integers("lengths", lengths)
        if lengths.shape != (batch,) or lengths.dtype != torch.int64:
            raise ValueError(f"lengths: expected [{batch}] integers, got {lengths.dtype} {list(lengths.shape)}")
        if readable(lengths) and bool(((lengths < 0) | (lengths > size)).any()):
            raise ValueError(f"lengths: expected [{batch}] values in 0..{size}, got {lengths.tolist()}")
        return lengths.to(self.device)


def _devices(
    towers: str,
    device: torch.device | str,
    context_device: torch.device | str | None,
    denoiser_device: torch.device | str | None,
) -> dict[str, torch.device]:
    """The device of each tower, checked."""
    if towers not in TOWERS:
        raise ValueError(f"towers: expected one of {TOWERS}, got {towers!r}")
    found = {}
    for tower, own in (("context", context_device), ("denoiser", denoiser_device)):
        if own is not None and towers not in ("both", tower):
            raise ValueError(f"{tower}_device: expected None for towers={towers!r}, got {str(own)!r}")
        name, chosen = ("device", device) if own is None else (f"{tower}_device", own)
        try:
            found[tower] = torch.empty(0, device=chosen).device  # "cuda" is the current GPU
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"{name}: expected a device of this machine, got {str(chosen)!r} ({reason})") from error
    return found
