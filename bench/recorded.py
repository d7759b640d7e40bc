"""A step call by call, as a recording, and its kernels alone: `python -m bench.recorded`.

The shipped model's steps at batch 1: a denoising step and a commit of 16 tokens, a token of autoregression, a draft
of 16 tokens verified and accepted. Each is checked to the bit, then timed in turns, and the fastest run counts, which
other work on the machine disturbs least. "Kernels" is the sum over a recording's kernels, each run alone, again and
again: what the step would take if nothing lay between them and everything that they read were in the caches.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

import twotower_kernels as tt
from twotower_kernels.bench.cases.model import BLOCK
from twotower_kernels.bench.report.tables import where
from twotower_kernels.model.autoregression import next_token
from twotower_kernels.model.capture import WORTH_AFTER, CapturedModel
from twotower_kernels.ops.recording import CpuRecordings, Replay

CONTEXT, RUNS, CHAIN = 128, 300, 10  # tokens; runs; how many of them go on behind one another
SAMPLING: dict[str, Any] = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
Step = Callable[[Any, tt.ContextState], Any]  # of the model, or of what stands for it


def steps(model: tt.TwoTowerModel) -> dict[str, Step]:
    """By name: a call of the model, or of a `CapturedModel`, on a state that it may consume."""
    torch.manual_seed(0)
    block, token = torch.randint(4, model.config.vocab_size, (1, BLOCK)), torch.tensor([[5]])
    t, seeds, counts = torch.tensor([0.5]), torch.tensor([7]), torch.tensor([5])

    def autoregress(of: Any, state: tt.ContextState) -> Any:
        if isinstance(of, CapturedModel):
            return of.next_token(token, state, seeds, 0, SAMPLING)
        return next_token(of, token, state, seeds, 0, SAMPLING)

    return {
        f"denoise {BLOCK}": lambda of, state: of.denoise(block, state, t),
        f"commit {BLOCK}": lambda of, state: of.commit(block, state),
        "next token": autoregress,
        f"verify {BLOCK}, accept 5": lambda of, state: of.accept(of.verify(block, state), counts),
    }


def contents(result: Any) -> torch.Tensor:
    """What tells two results of a step apart."""
    if isinstance(result, tuple):
        state, proposal = result
        return torch.cat([state.logits.flatten(), proposal.logits.flatten()])
    return result.logits if isinstance(result, tt.ContextState) else result


def seconds(program: Callable[[], Any]) -> float:
    start = time.perf_counter()
    program()
    return time.perf_counter() - start


def kernels(replays: list[Replay]) -> float:
    """Seconds of their kernels, each the fastest of its runs."""
    total = 0.0
    for replay in replays:
        for n in range(len(replay.calls)):
            total += min(seconds(lambda n=n, run=replay.calls.run: run(n, n + 1)) for _ in range(RUNS // 3))
    return total


def measured(model: tt.TwoTowerModel, step: Step) -> tuple[float, float, float, float]:
    """Seconds of a step of the model, of one by recordings, of its replays, and of their kernels."""
    captured = CapturedModel(model, CpuRecordings())
    prompt = torch.randint(4, model.config.vocab_size, (1, CONTEXT), generator=torch.Generator().manual_seed(1))
    origin = model.prefill(prompt).room_for(CHAIN * BLOCK)  # no step moves keys and values
    states = [origin.replaced(), origin.replaced()]

    def take(which: int, of: Any) -> Any:
        """A step, behind the last one."""
        result = step(of, states[which])
        after = result[0] if isinstance(result, tuple) else result
        if isinstance(after, tt.ContextState):
            states[which] = after
        return result

    for _ in range(WORTH_AFTER + 2):
        ours, theirs = take(0, captured), take(1, model)
        assert torch.equal(contents(ours), contents(theirs)), "a recorded step says something else"
    recordings = [r for r in captured.recordings.of(origin).calls.values() if not isinstance(r, int)]
    replays = [r.replay for r in recordings if isinstance(r.replay, Replay)]
    programs: list[Callable[[], Any]] = [lambda: take(1, model), lambda: take(0, captured)]
    programs.append(lambda: [replay() for replay in replays])
    best = [float("inf")] * len(programs)
    for n in range(RUNS):
        if n % CHAIN == 0:
            states[:] = [origin.replaced(), origin.replaced()]
        best = [min(least, seconds(program)) for least, program in zip(best, programs, strict=True)]
    return best[0], best[1], best[2], kernels(replays)


def table() -> list[str]:
    """The lines of the table, in Markdown."""
    model = tt.TwoTowerModel.from_pretrained(tt.demo_path())
    lines = ["| step | call by call, ms | recorded, ms | the replay of it, ms | kernels, ms |", "|---|---|---|---|---|"]
    for name, step in steps(model).items():
        figures = (f"{1e3 * figure:.3f}" for figure in measured(model, step))
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return lines


def main() -> None:
    """The program."""
    argparse.ArgumentParser(prog="python -m bench.recorded", description=str(__doc__).splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    print(where("cpu"))
    print(*table(), sep="\n", flush=True)


if __name__ == "__main__":
    main()
