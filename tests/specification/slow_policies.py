"""The un-masking rules once more, one row at a time in Python floats, straight from their descriptions.

Nothing here is shared with `reference.remask`: there is a function per system, no common options, and no tensors. A row
is a list of logits per position. `step` returns the tokens after a step; its arguments are those of the recordings in
tests/data/golden/policies, so the rules can be checked against these and then against `remask` on any other input.
"""

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class Row:
    """One row when a step begins."""

    p: dict[str, Any]  # the parameters of the case
    z: list[list[float]]  # logits [S][V]
    tokens: list[int]
    i: int  # the step
    initial: int  # masks at the start of the block
    writable: list[bool]
    given: list[int] | None = None  # candidates that were drawn
    u: list[float] | None = None  # a number per position that was drawn

    def __post_init__(self) -> None:
        self.mask = self.p.get("mask_token_id", -1)
        self.size = len(self.tokens)
        self.masks = [s for s in range(self.size) if self.tokens[s] == self.mask and self.writable[s]]
        self.n = len(self.masks)
        self.steps = self.p.get("num_steps", self.p.get("denoising_steps", self.p.get("max_denoising_steps", 1)))

    def softmax(self, s: int, without: tuple[int, ...] = (), temperature: float = 1.0) -> list[float]:
        z = [-math.inf if v in without else x / temperature for v, x in enumerate(self.z[s])]
        top = max(z)
        e = [math.exp(x - top) for x in z]
        return [x / sum(e) for x in e]

    def candidates(self, without: tuple[int, ...] = ()) -> list[int]:
        def first_best(z: list[float]) -> int:
            allowed = [v for v in range(len(z)) if v not in without]
            return next(v for v in allowed if z[v] == max(z[w] for w in allowed))

        return [first_best(z) for z in self.z] if self.given is None else list(self.given)

    def write(self, positions: Any, x: list[int]) -> list[int]:
        return [x[s] if s in set(positions) else self.tokens[s] for s in range(self.size)]


def best(positions: Any, score: Any, k: int) -> list[int]:
    """The k positions of largest score, ties from the left."""
    return sorted(positions, key=lambda s: (-score[s], s))[: max(k, 0)]


def entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def margin(p: list[float]) -> float:
    first, second = sorted(p, reverse=True)[:2]
    return first - second


def filtered(row: Row, s: int, order: str) -> list[float]:
    """Softmax after the letters of `order`: t temperature, k top-k, p top-p (the crossing token stays)."""
    z = list(row.z[s])
    for letter in order:
        if letter == "t" and row.p.get("temperature"):
            z = [x / row.p["temperature"] for x in z]
        if letter == "k" and row.p.get("top_k"):
            kept = sorted(z, reverse=True)[: row.p["top_k"]]
            z = [x if x >= kept[-1] else -math.inf for x in z]
        if letter == "p" and row.p.get("top_p", 1.0) < 1:
            e = [math.exp(x - max(z)) for x in z]
            total = 0.0
            for v in sorted(range(len(z)), key=lambda v: -z[v]):
                if total > row.p["top_p"] * sum(e):
                    z[v] = -math.inf
                total += e[v]
    e = [math.exp(x - max(z)) for x in z]
    return [x / sum(e) for x in e]


def even(total: int, steps: int, i: int) -> int:
    return total // steps + (1 if i < total % steps else 0)


def clean(name: str, t: float) -> float:
    if name == "cosine":
        return math.cos(math.pi * t / 2)
    if name == "exponential":
        return (math.exp(-3 * t) - math.exp(-3)) / (1 - math.exp(-3))
    return 1 - t


def unmask(row: Row) -> list[int]:
    """TwoTower, Megatron's confidence_unmasking."""
    x = row.candidates((row.mask,))
    c = [row.softmax(s, (row.mask,))[x[s]] for s in range(row.size)]
    confident = sum(c[s] > row.p["confidence_threshold"] for s in row.masks)
    k = row.n if row.i == row.steps - 1 else max(1, confident, math.ceil(row.n / (row.steps - row.i)))
    return row.write(best(row.masks, c, min(k, row.n)), x)


def predict_and_noise(row: Row, e2d2: bool) -> list[int]:
    x = row.candidates((row.mask,))
    p = [row.softmax(s, (row.mask,)) for s in range(row.size)]
    c = [p[s][x[s]] for s in range(row.size)]
    if row.p.get("confidence_margin_based_noising"):
        score: Any = [margin(p[s]) for s in range(row.size)]
    else:
        score = c if row.p.get("confidence_based_noising") else row.u
    s_time = 1 - (row.i + 1) * (1 - row.p["min_t"]) / row.steps
    keep = max(0, min(int((1 - clean(row.p["noise_schedule"], s_time)) * row.size), row.n - 1))
    if row.p.get("adaptive_unmasking"):
        keep = row.n - (1 if row.i / row.steps < 0.4 else min(row.n, math.ceil(row.n / (row.steps - row.i))))
    if row.i == row.steps - 1 and not e2d2:
        keep = 0
    chosen = best(row.masks, score, row.n - keep)
    if e2d2:
        chosen += [s for s in row.masks if c[s] >= row.p["confidence_threshold"]]
    return row.write(chosen, x)


def posterior_greedy(row: Row) -> list[int]:
    t = [1 - i * (1 - row.p["min_t"]) / row.steps for i in (row.i, row.i + 1)]
    a_t, a_s = (clean(row.p["noise_schedule"], time) for time in t)
    after = list(row.tokens)
    for s in row.masks:
        q = [x * (a_s - a_t) / (1 - a_t) for x in row.softmax(s, (row.mask,))]
        q[row.mask] = (1 - a_s) / (1 - a_t)
        after[s] = q.index(max(q))
    return after


def plain(row: Row) -> tuple[list[int], list[float]]:
    """Candidate and confidence where the mask token takes part and nothing is tempered."""
    x = row.candidates()
    return x, [row.softmax(s)[x[s]] for s in range(row.size)]


def ranking(row: Row, c: list[float]) -> Any:
    """What LLaDA and its relatives rank by."""
    if row.p.get("neg_entropy"):
        return [-entropy(row.softmax(s)) for s in range(row.size)]
    return row.u if row.p.get("remasking") == "random" else c


def llada(row: Row) -> list[int]:
    x, c = plain(row)
    return row.write(best(row.masks, ranking(row, c), even(row.initial, row.steps, row.i)), x)


def threshold(row: Row) -> list[int]:
    """Fast-dLLM, dllm, Automodel, Megatron-Bridge."""
    x, c = plain(row)
    score = ranking(row, c)
    return row.write(best(row.masks, score, 1) + [s for s in row.masks if score[s] >= row.p["threshold"]], x)


def factor(row: Row, last_free: bool) -> list[int]:
    x, c = plain(row)
    ordered, k = best(row.masks, c, row.n), min(row.n, 1)
    while k and k < row.n and c[ordered[k]] >= 1 - row.p["factor"] / (k + 2):
        k += 1
    if last_free and k == row.n - 1:
        k = row.n
    return row.write(ordered[:k], x)


def dllm_alpha(row: Row) -> list[int]:
    suppressed = tuple(row.p.get("suppress_tokens", ()))
    x = row.candidates(suppressed)
    without = suppressed + tuple(row.p.get("begin_suppress_tokens", ()))
    c = [row.softmax(s, without)[x[s]] for s in range(row.size)]
    linear = row.p["scheduler"] == "LinearAlphaScheduler"

    def a(t: float) -> float:
        return 1 - t if linear else 1 - math.cos(math.pi * (1 - t) / 2)

    quotas, left = [], row.initial
    for j in range(row.steps):
        t, s_time = (row.steps - j) / row.steps, (row.steps - j - 1) / row.steps
        quota = round(round(left * (1 - (1 - a(s_time)) / (1 - a(t))), 9))
        quotas += [quota] if quota else []
        left -= quota
    quota = quotas[row.i] if row.i < len(quotas) else 0
    return row.write(best(row.masks, ranking(row, c), quota), x)


def dream(row: Row) -> list[int]:
    x = row.candidates()
    t = 1 - row.i * (1 - row.p["eps"]) / row.steps
    s_time = 1 - (row.i + 1) * (1 - row.p["eps"]) / row.steps
    leave = 1.0 if row.i == row.steps - 1 else 1 - s_time / t
    if row.p["alg"] == "origin":
        assert row.u is not None
        return row.write([s for s in row.masks if row.u[s] < leave], x)
    p = [filtered(row, s, "tpk") for s in range(row.size)]
    score = {
        "maskgit_plus": [p[s][x[s]] for s in range(row.size)],
        "topk_margin": [margin(q) for q in p],
        "entropy": [-entropy(q) for q in p],
    }[row.p["alg"]]
    if temperature := row.p.get("alg_temp"):
        assert row.u is not None  # the best of noisy scores, which are draws without replacement
        score = [score[s] / temperature - math.log(-math.log1p(-row.u[s])) for s in range(row.size)]
    return row.write(best(row.masks, score, int(row.n * leave)), x)


def dream_fast(row: Row) -> list[int]:
    """Fast-dLLM's Dream variant: what was refused before is the budget not yet spent."""
    x, c = plain(row)
    budget = min(row.initial, (row.i + 1) * row.initial // row.steps) - (row.initial - row.n)
    first = best(row.masks, c, max(1, budget))  # the original never gets ahead of its budget
    return row.write([s for s in first if s == first[0] or c[s] >= row.p["threshold"]], x)


def block_schedule(row: Row, kind: str, tau: float | None, quota: int, order: str = "tkp") -> list[int]:
    """SDAR, JetEngine, LLaDA2, vLLM, LMDeploy: at least `quota`, by confidence, from the left or by chance."""
    x = row.candidates()
    p = [filtered(row, s, order) for s in range(row.size)]
    c = [p[s][x[s]] for s in range(row.size)]
    start = min(row.masks, default=0)
    window = [s for s in row.masks if s < start + quota]
    if kind == "sequential":
        return row.write(window, x)
    if kind == "random":
        return row.write(best(row.masks, row.u, quota), x)
    confident = [] if tau is None else [s for s in row.masks if c[s] > tau]
    if tau is not None and len(confident) >= quota:
        return row.write(confident, x)
    return row.write(window if kind == "leftmost" else best(row.masks, c, quota), x)


def jetengine(row: Row) -> list[int]:
    strategy, quota = row.p["remasking_strategy"], even(row.size, row.steps, row.i)
    if strategy == "entropy_bounded":
        x = row.candidates()
        h = [entropy(filtered(row, s, "tkp")) for s in range(row.size)]
        ordered, total, k = best(row.masks, [-e for e in h], row.n), 0.0, 0
        for s in ordered:
            total += h[s]
            k += total < row.p["eb_threshold"]
        return row.write(ordered[: max(1, k)], x)
    if strategy == "low_confidence_dynamic":
        kind = "best" if row.p.get("function") == "postprocess_loop" else "leftmost"
        return block_schedule(row, kind, row.p["dynamic_threshold"], quota)
    return block_schedule(row, {"low_confidence_static": "best"}.get(strategy, strategy), None, quota)


def sdar(row: Row) -> list[int]:
    strategy, quota = row.p["remasking_strategy"], even(row.size, row.steps, row.i)
    tau = row.p["confidence_threshold"] if strategy == "low_confidence_dynamic" else None
    return block_schedule(row, "sequential" if strategy == "sequential" else "best", tau, quota)


def llada2(row: Row) -> list[int]:
    steps = min(row.steps, row.size // row.p["minimal_topk"]) if "minimal_topk" in row.p else row.steps
    quota = row.p.get("num_transfer") or even(row.size, steps, row.i)
    return block_schedule(row, "best", row.p["threshold"], quota, "tkp" if row.given else "")


def lmdeploy(row: Row) -> list[int]:
    x, c = plain(row)
    d = max(1, row.size // row.steps)
    if row.p["unmasking_strategy"] == "low_confidence_dynamic":
        tau = row.p["confidence_threshold"]
        return row.write(best(row.masks, c, 1) + [s for s in row.masks if c[s] >= tau], x)
    if row.p["unmasking_strategy"] == "low_confidence_static":
        return row.write(best(row.masks, c, d), x)
    start = min(row.masks, default=0)
    return row.write({(start + j) % row.size for j in range(d)} & set(row.masks), x)


def llada21(row: Row) -> list[int]:
    x, c = plain(row)
    chosen = [s for s in row.masks if c[s] > row.p["threshold"]]
    if len(chosen) < row.p["num_to_transfer"]:
        chosen = best(row.masks, c, row.p["num_to_transfer"])
    committed = [s for s in range(row.size) if row.tokens[s] != row.mask and row.writable[s]]
    return row.write(chosen + [s for s in committed if c[s] > row.p["editing_threshold"]], x)


def dinfer_threshold(row: Row) -> list[int]:
    x, c = plain(row)
    pool = [s for s in row.masks if x[s] != row.mask]
    bound = min(row.p["threshold"], max((c[s] for s in pool), default=0.0) - 1e-5)
    return row.write([s for s in pool if c[s] >= bound], x)


def dinfer_cache(row: Row) -> list[int]:
    x, c = plain(row)
    many = best(row.masks, c, row.p["minimal_topk"])
    return row.write(many + [s for s in row.masks if c[s] >= row.p["threshold"]], x)


def runs(pool: list[int]) -> list[list[int]]:
    found: list[list[int]] = []
    for s in sorted(pool):
        if found and found[-1][-1] == s - 1:
            found[-1].append(s)
        else:
            found.append([s])
    return found


def hierarchy(row: Row) -> list[int]:
    """dInfer's three hierarchy decoders."""
    x, c = plain(row)
    weak = row.p.get("remask_threshold", -1.0)
    back = [s for s in range(row.size) if row.tokens[s] != row.mask and row.writable[s] and c[s] < weak]
    pool = row.masks + back
    chosen = {best(run, c, 1)[0] for run in runs(pool) if max(c[s] for s in run) > row.p["low_threshold"]}
    chosen |= {s for s in pool if c[s] > row.p.get("threshold", math.inf)}
    chosen |= set(best(set(pool) - chosen, c, len(back) + 1 - len(chosen)))
    after = row.write(chosen, x)
    return [row.mask if s in back and s not in chosen else after[s] for s in range(row.size)]


def wedlm(row: Row) -> list[int]:
    x = row.candidates()
    start = min(row.masks, default=0)
    penalty = row.p["pos_penalty_factor"]
    e = [entropy(row.softmax(s)) + penalty * (s - start) for s in range(row.size)]
    tau = row.p["entropy_threshold"]
    chosen = [] if tau is None else [s for s in row.masks if e[s] < tau]
    return row.write(chosen or best(row.masks, [-y for y in e], 1), x)


def wedlm_hf(row: Row) -> list[int]:
    c = [max(row.softmax(s, (), row.p["temperature"])) for s in range(row.size)]
    tau = row.p["confidence_threshold"]
    chosen = [s for s in row.masks if c[s] >= tau] if tau else []
    return row.write(chosen or best(row.masks, c, 1), row.candidates())


def diffulex(row: Row) -> list[int]:
    x, c = plain(row)
    p = [row.softmax(s) for s in range(row.size)]
    fallback = c
    if row.p.get("margin_confidence"):
        fallback = [margin(q) for q in p]
    if row.p.get("neg_entropy"):
        fallback = [-entropy(q) for q in p]
    chosen: list[int] = []
    for start in range(0, row.size, row.p["block_size"]):
        block = [s for s in row.masks if start <= s < start + row.p["block_size"]]
        before = row.tokens[max(start - row.p["block_size"], 0) : start]
        done = sum(v != row.mask for v in before) / len(before) if before else 1.0
        confident = [s for s in block if c[s] > row.p["accept_threshold"]]
        if confident or done < row.p.get("complete_threshold", 0.0):
            chosen += confident
        else:
            chosen += best(block, fallback, 1)
    return row.write(chosen, x)


def diffusion_gemma(row: Row) -> list[int]:
    low, high = row.p["t_min"], row.p["t_max"]
    temperature = low + (high - low) * (row.steps - row.i) / row.steps
    h = [entropy(row.softmax(s, (), temperature)) for s in range(row.size)]
    total, accepted = 0.0, []
    for s in best([s for s in range(row.size) if row.writable[s]], [-e for e in h], row.size):
        if total <= row.p["entropy_bound"]:
            accepted.append(s)
        total += h[s]
    assert row.u is not None and row.given is not None  # u: the random canvas
    noise = [int(row.u[s]) if row.writable[s] else row.tokens[s] for s in range(row.size)]
    return [row.given[s] if s in accepted else noise[s] for s in range(row.size)]


RULES = {
    "twotower.unmask": unmask,
    "megatron.confidence_unmasking": unmask,
    "megatron.predict_and_noise": lambda row: predict_and_noise(row, e2d2=False),
    "e2d2.predict_and_noise": lambda row: predict_and_noise(row, e2d2=True),
    "megatron.posterior_greedy": posterior_greedy,
    "e2d2.posterior_greedy": posterior_greedy,
    "llada.": llada,
    "automodel.low_confidence": llada,
    "megatron_bridge.neg_entropy_schedule": llada,
    "megatron_bridge.": threshold,
    "automodel.threshold": threshold,
    "fast_dllm.threshold": threshold,
    "dllm.threshold": threshold,
    "fast_dllm.factor": lambda row: factor(row, last_free=True),
    "dllm.factor": lambda row: factor(row, last_free=False),
    "dllm.alpha_schedule": dllm_alpha,
    "dream.": dream,
    "fast_dllm.dream_confidence_threshold": dream_fast,
    "sdar.": sdar,
    "jetengine.": jetengine,
    "llada2.": llada2,
    "dllm.threshold_or_schedule": llada2,
    "vllm_dllm_plugin.": llada2,
    "lmdeploy.": lmdeploy,
    "llada21.": llada21,
    "dinfer.threshold": dinfer_threshold,
    "dinfer.credit": dinfer_threshold,
    "dinfer.cache": dinfer_cache,
    "dinfer.hierarchy": hierarchy,
    "wedlm.entropy_position": wedlm,
    "wedlm.hf_confidence": wedlm_hf,
    "diffulex.": diffulex,
    "diffusion_gemma.": diffusion_gemma,
}


def step(rule: str, row: Row) -> list[int]:
    """The tokens of the row after one step of the rule; KeyError if the rule is not written down here."""
    known = [prefix for prefix in RULES if rule.startswith(prefix)]
    if not known:
        raise KeyError(rule)
    return RULES[max(known, key=len)](row)
