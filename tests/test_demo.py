"""The demo: what it prints, and what it says when it cannot."""

from pathlib import Path

import pytest

from reference import demo
from tests.small_model import save_small_model


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    return save_small_model(tmp_path)


def test_demo_shows_every_step(
    shipped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Piped: one line per call of the denoiser, masks visible; then both texts, and what they cost."""
    flags = ["--model", str(shipped), "--prompt", "abc", "--max-new-tokens", "20"]
    monkeypatch.setattr("sys.argv", ["demo", *flags])
    demo.main()
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("block ")]
    for line in steps:
        assert f" {line.count(demo.BLANK)} masked" in line
    (costs,) = (line.split() for line in lines if "block diffusion  " in line)
    assert int(costs[3]) == len(steps) > 2
    assert sum(line.startswith("abc") for line in lines) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--model", "nowhere"], "no model in nowhere"), (["--threshold", "nan"], "threshold .* nan")],
)
def test_demo_says_what_is_wrong(
    shipped: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.setattr("sys.argv", ["demo", "--model", str(shipped), *flags])
    with pytest.raises(SystemExit, match=message):
        demo.main()
