"""The demo model's data: the pinned transformers' model definitions and the Python standard library, which are wherever
the tests can run, and a byte-level BPE trained on them."""

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

SPECIAL = ("<pad>", "<bos>", "<eos>", "<mask>")  # ids 0, 1, 2, 3
SOURCES = ("transformers", "stdlib")
TESTS = {"site-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
TABLES = {"encodings", "pydoc_data"}  # a sixth of the library: code pages and a manual, written by programs
LEFT_OUT = TESTS | TABLES


@dataclass(frozen=True)
class Corpus:
    """Sources by (where from, path below its root), split by whole folders.

    fingerprint: a hash of the list of files and their contents.
    versions: of Python, and of transformers.
    """

    train: dict[tuple[str, str], str]
    held_out: dict[tuple[str, str], str]
    fingerprint: str
    versions: dict[str, str]

    def held_out_paths(self) -> dict[str, list[str]]:
        """The files never trained on, sorted, per source: what `held_out.json` says."""
        return {source: sorted(path for of, path in self.held_out if of == source) for source in SOURCES}

    def held_out_texts(self, source: str) -> list[str]:
        """The held-out files of one source, by path."""
        return [text for (of, _), text in sorted(self.held_out.items()) if of == source]


def is_held_out(folder: str) -> bool:
    """One folder (of the library: module or package) in twenty, by the hash of its name: the same split everywhere."""
    return hashlib.sha256(folder.encode()).digest()[0] % 20 == 0


def _standard_library(root: Path) -> Iterator[tuple[str, Path]]:
    """(module, path) of every source file, but test suites, generated tables and the file that knows this machine."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not (LEFT_OUT & set(relative.parts) or relative.name.startswith("_sysconfigdata")):
            yield relative.parts[0].removesuffix(".py"), path


def _model_definitions(root: Path) -> Iterator[tuple[str, Path]]:
    """(folder, path) of every `modeling_*.py` of transformers; its folder of a model's own stands for the model."""
    for path in sorted(root.rglob("modeling_*.py")):
        yield path.relative_to(root).parent.as_posix(), path


def corpus() -> Corpus:
    """Every readable file of both sources.

    Raises:
        ModuleNotFoundError: transformers is not installed (it is among the requirements of development).
    """
    found = util.find_spec("transformers")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the demo model's data includes transformers: install requirements-dev.txt")
    roots = {"transformers": Path(found.origin).parent, "stdlib": Path(sysconfig.get_paths()["stdlib"])}
    files = {"transformers": _model_definitions, "stdlib": _standard_library}
    train: dict[tuple[str, str], str] = {}
    held_out: dict[tuple[str, str], str] = {}
    digest = hashlib.sha256()
    for source in SOURCES:
        for folder, path in files[source](roots[source]):
            raw = path.read_bytes()
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                continue
            name = path.relative_to(roots[source]).as_posix()
            digest.update(f"{source} {name} {hashlib.sha256(raw).hexdigest()}\n".encode())
            (held_out if is_held_out(folder) else train)[source, name] = text
    versions = {"Python": sys.version.split()[0], "transformers": metadata.version("transformers")}
    return Corpus(train, held_out, digest.hexdigest(), versions)


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
