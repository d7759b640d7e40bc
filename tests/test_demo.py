"""The demo: what it prints, and what it says when it cannot."""

import json
import string
from pathlib import Path

import pytest
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from reference import demo
from tests.test_generate import VOCAB, small_model


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """A model folder as the demo reads it: the small model, and a tokenizer of single letters."""
    model = small_model()
    config = {**vars(model.config), "torch_dtype": "float64"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors"
    )
    words = ["<pad>", "<bos>", "<eos>", "<mask>", *string.ascii_lowercase[: VOCAB - 4]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(words[:4])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


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
