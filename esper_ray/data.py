"""Data sets that come with Python or with an installed package; nothing is downloaded."""

from __future__ import annotations

import hashlib
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from esper_ray.errors import ConfigError
from esper_ray.keyed_random import keyed_integers, stream_key

Batch = tuple[Tensor, Tensor]
SPLITS = ("train", "gate", "test")


@dataclass(frozen=True, slots=True)
class DatasetCard:
    """What was read: `bytes` and `sha256` cover all splits, `splits` holds the bytes of each."""

    name: str
    source: str
    licence: str
    metric: str
    bytes: int
    sha256: str
    splits: Mapping[str, int]


class Split(ABC):
    """Samples addressed by position."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def take(self, positions: Tensor) -> Batch:
        """Inputs and int64 targets at `positions` (n,) int64."""

    def draw(self, count: int, *key: object) -> Batch:
        """`count` samples, with replacement, as a pure function of `key`."""
        return self.take(keyed_integers(stream_key(*key), count, len(self)))

    def spread(self, count: int) -> Tensor:
        """Positions of `count` different samples at even distances, all of them if there are fewer.

        Judging must not see a sample twice: it would look more certain than it is.
        """
        count = min(count, len(self))
        return torch.arange(count) * len(self) // count

    def batches(self, size: int) -> Iterator[Batch]:
        """All samples in order, `size` at a time; the last batch may be smaller."""
        for first in range(0, len(self), size):
            yield self.take(torch.arange(first, min(first + size, len(self))))


@dataclass(frozen=True, slots=True)
class ByteSplit(Split):
    """Windows of a text: `window` bytes in, the next byte out."""

    text: Tensor
    window: int

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.text) - self.window

    def take(self, positions: Tensor) -> Batch:
        """Windows (n, window) int64 and next bytes (n,)."""
        spans = self.text[positions[:, None] + torch.arange(self.window + 1)].long()
        return spans[:, : self.window], spans[:, self.window]


@dataclass(frozen=True, slots=True)
class TableSplit(Split):
    """Rows of a table of features with a class each."""

    features: Tensor
    classes: Tensor

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.classes)

    def take(self, positions: Tensor) -> Batch:
        """Features (n, width) float32 and classes (n,)."""
        return self.features[positions], self.classes[positions]


@dataclass(frozen=True, slots=True)
class Dataset:
    """Train, gate and test splits; decisions read gate, test is read once at the end."""

    card: DatasetCard
    train: Split
    gate: Split
    test: Split

    def split(self, name: str) -> Split:
        """The split of that name."""
        return {"train": self.train, "gate": self.gate, "test": self.test}[name]

    def gate_loss(self, model: nn.Module) -> Tensor:
        """(samples,) cross-entropy of a model on the gate split, always in the same order."""
        x, y = self.gate.take(torch.arange(len(self.gate)))
        return cross_entropy(model(x), y, reduction="none")


def split_of(content: bytes) -> str:
    """Split of a file or sample, by its hash: 5/7 train, 1/7 gate, 1/7 test."""
    part = int.from_bytes(hashlib.sha256(content).digest()[:8], "big") % 7
    return {0: "gate", 1: "test"}.get(part, "train")


def _stdlib_documents() -> Iterator[bytes]:
    """The topics of the language reference, then the library's top-level modules, sorted."""
    for _, text in sorted(topics.items()):
        yield text.encode()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield path.read_bytes()


def stdlib_text(window: int = 8, cap_bytes: int = 2_000_000) -> Dataset:
    """The running Python's reference topics and library sources, split by document."""
    if type(window) is not int or type(cap_bytes) is not int or window < 1 or cap_bytes < 1_000:
        raise ConfigError(
            f"stdlib_text cannot use window {window!r} with cap_bytes {cap_bytes!r}",
            "choose a whole window of at least 1 and at least 1000 bytes",
        )
    parts: dict[str, list[bytes]] = {name: [] for name in SPLITS}
    room = cap_bytes
    for content in _stdlib_documents():
        parts[split_of(content)].append(content[:room])
        room -= len(content[:room])
        if room == 0:
            break
    texts = {name: b"".join(parts[name]) for name in SPLITS}
    if min(map(len, texts.values())) <= window:
        raise ConfigError(
            f"cap_bytes {cap_bytes} leaves a split empty", "raise data.args.cap_bytes"
        )
    splits = {
        name: ByteSplit(torch.frombuffer(bytearray(text), dtype=torch.uint8), window)
        for name, text in texts.items()
    }
    about = ("stdlib_text", "this Python's standard library", "PSF-2.0", "bits_per_byte")
    return Dataset(_card(*about, texts), **splits)


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, features in [0, 1], split by sample hash."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ConfigError(
            "data set 'digits' needs scikit-learn", "pip install 'esper-ray[demo]'"
        ) from error
    bunch = load_digits()
    features = torch.tensor(bunch.data, dtype=torch.float32) / 16
    classes = torch.tensor(bunch.target, dtype=torch.int64)
    member = [split_of(row.numpy().tobytes()) for row in features]
    rows = {name: torch.tensor([m == name for m in member]) for name in SPLITS}
    splits = {name: TableSplit(features[mask], classes[mask]) for name, mask in rows.items()}
    contents = {
        name: s.features.numpy().tobytes() + s.classes.numpy().tobytes()
        for name, s in splits.items()
    }
    about = ("digits", "scikit-learn load_digits", "CC BY 4.0", "accuracy")
    return Dataset(_card(*about, contents), **splits)


def _card(
    name: str, source: str, licence: str, metric: str, contents: Mapping[str, bytes]
) -> DatasetCard:
    digest = hashlib.sha256(b"".join(contents[split] for split in SPLITS)).hexdigest()
    sizes = {split: len(contents[split]) for split in SPLITS}
    return DatasetCard(name, source, licence, metric, sum(sizes.values()), digest, sizes)


_LOADERS: Mapping[str, Callable[..., Dataset]] = {"stdlib_text": stdlib_text, "digits": digits}


def load(name: str, **args: object) -> Dataset:
    """The data set of that name; ConfigError lists the known ones and refuses unknown arguments."""
    if name not in _LOADERS:
        raise ConfigError(f"no data set is named {name!r}", f"choose one of: {', '.join(_LOADERS)}")
    try:
        return _LOADERS[name](**args)
    except TypeError as error:
        raise ConfigError(f"data set {name!r}: {error}", "see docs/configuration.md") from error
