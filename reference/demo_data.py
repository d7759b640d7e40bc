"""The demo model's data: the Python standard library that every machine has, and a byte-level BPE trained on it."""

import hashlib
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

SPECIAL = ("<pad>", "<bos>", "<eos>", "<mask>")  # ids 0, 1, 2, 3
TESTS = {"site-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
TABLES = {"encodings", "pydoc_data"}  # a sixth of the library: code pages and a manual, written by programs
LEFT_OUT = TESTS | TABLES


@dataclass(frozen=True)
class Corpus:
    """Sources by path within the library, split by whole modules; `fingerprint` hashes the file list and contents."""

    train: dict[str, str]
    held_out: dict[str, str]
    fingerprint: str
    python: str


def _held_out(module: str) -> bool:
    """One module (or package) in twenty, by the hash of its name, so that the split is the same everywhere."""
    return hashlib.sha256(module.encode()).digest()[0] % 20 == 0


def standard_library() -> Corpus:
    """Every readable source file of the running Python's standard library, but test suites and generated tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if LEFT_OUT & set(relative.parts) or relative.name.startswith("_sysconfigdata"):  # this machine's own paths
            continue
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        digest.update(f"{relative.as_posix()} {hashlib.sha256(raw).hexdigest()}\n".encode())
        module = relative.parts[0].removesuffix(".py")
        (held_out if _held_out(module) else train)[relative.as_posix()] = text
    return Corpus(train, held_out, digest.hexdigest(), sys.version.split()[0])


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: every byte string has an encoding, and the special tokens have the released ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """All texts as one stream of ids, each as <bos> … <eos>."""
    pieces = [np.array([1, *e.ids, 2], dtype=np.int64) for e in tokenizer.encode_batch(texts)]
    return torch.from_numpy(np.concatenate(pieces))


def windows(stream: Tensor, length: int, count: int, generator: torch.Generator) -> Tensor:
    """`[count, length]` random windows of the stream."""
    starts = torch.randint(len(stream) - length + 1, (count,), generator=generator)
    return stream[starts[:, None] + torch.arange(length)]
