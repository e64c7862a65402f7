"""`.pt` files that attack: none is run, none takes more than a bounded child may."""

from __future__ import annotations

import io
import os
import pickle
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esper_ray.errors import UnsafeInputError
from esper_ray.legacy.archive import check_archive
from esper_ray.legacy.loading import PtLoader
from tests.legacy.old_store import record


def saved(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def rewritten(
    data: bytes, change: Callable[[str, bytes], tuple[str, bytes]], **options: Any
) -> bytes:
    """The same archive with other entries."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", **options) as new:
        for name in old.namelist():
            new.writestr(*change(name, old.read(name)))
    return stream.getvalue()


def with_pickle(data: bytes) -> bytes:
    """An archive of torch whose pickle is any bytes."""
    return rewritten(
        saved({}), lambda name, old: (name, data if name.endswith("data.pkl") else old)
    )


@pytest.fixture(scope="module")
def loader() -> Iterator[PtLoader]:
    with PtLoader() as one:
        yield one


class Runs:
    """Calls anything when it is unpickled."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def test_a_record_of_the_seed_documents_comes_through(loader: PtLoader) -> None:
    made = record(blueprint_state=torch.nn.Linear(3, 2).state_dict())
    found = loader.load(saved(made))
    weights, expected = found.pop("blueprint_state"), made.pop("blueprint_state")
    assert found == made
    assert type(found["metadata"]["pytorch_version"]) is str
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("call", [os.system, eval, exec, print, Path, getattr, os.mkdir])
def test_code_in_a_pickle_is_not_run(loader: PtLoader, call: Any, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    argument = f"touch {mark}" if call is os.system else f"open({str(mark)!r}, 'w')"
    if call in (os.mkdir, Path):
        argument = str(mark)
    arguments = (argument, "x") if call is getattr else (argument,)
    with pytest.raises(UnsafeInputError, match="asks for"):
        loader.load(saved({"state_data": Runs(call, *arguments)}))
    assert not mark.exists()


def test_raw_pickles_of_every_protocol_are_not_run(loader: PtLoader, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(Runs(os.system, f"touch {mark}"), protocol)
        for file in (data, with_pickle(data)):
            with pytest.raises(UnsafeInputError):
                loader.load(file)
    assert not mark.exists()


def test_allowed_classes_cannot_be_turned_into_calls(loader: PtLoader) -> None:
    for data in (
        b"\x80\x02ctorch.torch_version\nTorchVersion\n(X\x02\x00\x00\x00idtR}X\x01\x00\x00\x00ad.",
        b"\x80\x02ctorch.torch_version\nTorchVersion.__class__\n(X\x02\x00\x00\x00idtR.",
        b"\x80\x02c__builtin__\neval\n(X\x01\x00\x00\x001tR.",
        b"\x80\x02cesper_ray.legacy.unpickling\nos.system\n(X\x02\x00\x00\x00idtR.",
    ):
        with pytest.raises(UnsafeInputError):
            loader.load(with_pickle(data))


VALUES: dict[str, Any] = {
    "a numpy scalar": np.float64(1),
    "a numpy array": np.ones(3),
    "a tuple": (1, 2),
    "a set": {1},
    "bytes": b"x",
    "a complex number": 1j,
    "a dtype": torch.float32,
    "a size": torch.Size([1]),
    "a key of a tuple": {(1, 2): 3},
    "a huge number": 2**64,
    "a text of 100 kB": "x" * 100_000,
    "a control character": "a\0b",
    "a sparse tensor": torch.eye(3).to_sparse(),
    "a meta tensor": torch.empty(3, device="meta"),
    "a tensor of stride 0": torch.zeros(1).expand(10**9),
    "a tensor that overlaps itself": torch.zeros(10).as_strided((5, 6), (1, 1)),
    "a complex tensor": torch.ones(2, dtype=torch.complex64),
    "200,000 values": [0] * 200_000,
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_values_that_are_not_plain_are_refused(loader: PtLoader, value: Any) -> None:
    with pytest.raises(UnsafeInputError):
        loader.load(saved({"state_data": value}))


def test_deep_and_circular_values_are_refused(loader: PtLoader) -> None:
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    circle: list[Any] = []
    circle.append(circle)
    for value in (deep, circle):
        with pytest.raises(UnsafeInputError, match="nested more than"):
            loader.load(saved(value))


def test_a_declared_storage_that_is_not_there_is_refused(loader: PtLoader) -> None:
    whole = saved({"w": torch.ones(1000)})
    cut = rewritten(whole, lambda name, data: (name, data[:8] if "/data/" in name else data))
    with pytest.raises(UnsafeInputError):
        loader.load(cut)


def test_a_pickle_bomb_is_refused_and_the_next_file_is_read() -> None:
    # bytearray is the one call that torch allows of any length: 8 GiB, and texts of 16 MiB in all.
    bombs = (
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x02\x85R.",
        b"\x80\x02(" + b"X\x00\x00\x10\x00" + b"x" * 2**20 + b"q\x00" + b"h\x00" * 10**6 + b"t.",
        b"\x80\x02(" + b"]" * 10**6 + b"l.",
        b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".",
    )
    with PtLoader(timeout_s=30) as loader:
        for data in bombs:
            with pytest.raises(UnsafeInputError):
                loader.load(with_pickle(data))
        assert loader.load(saved({"a": 1})) == {"a": 1}


def test_a_child_that_takes_too_long_is_ended() -> None:
    with PtLoader(timeout_s=20) as loader:
        assert loader.load(saved(1)) == 1
        loader._timeout_s = 0.1
        assert loader._child is not None
        loader._child.send_signal(signal.SIGSTOP)
        with pytest.raises(UnsafeInputError, match=r"more than 0\.1 s"):
            loader.load(saved(2))
        loader._timeout_s = 20
        assert loader.load(saved(3)) == 3


# ---------------------------------------------------------------- archives


GOOD = saved(record(blueprint_state={"w": torch.ones(100)}))


def named(name: str) -> bytes:
    return rewritten(GOOD, lambda old, data: (name if old.endswith("/version") else old, data))


def twice() -> bytes:
    stream = io.BytesIO(GOOD)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(stream, "a") as archive:
        archive.writestr(archive.namelist()[0], b"x")
    return stream.getvalue()


ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "not a zip": (lambda: b"x" * 100, "no zip archive"),
    "no bytes": (lambda: b"", "no zip archive"),
    "the format before 1.6": (
        lambda: saved(record(), _use_new_zipfile_serialization=False),
        "before version 1.6",
    ),
    "cut": (lambda: GOOD[:-100], "no whole zip archive"),
    "deflated": (
        lambda: rewritten(GOOD, lambda *entry: entry, compression=zipfile.ZIP_DEFLATED),
        "is compressed",
    ),
    "a name that climbs": (lambda: named("../../../tmp/x"), "its archive names"),
    "an absolute name": (lambda: named("/etc/cron.d/x"), "its archive names"),
    "a name with a drive": (lambda: named("C:\\x"), "its archive names"),
    "a name with a line": (lambda: named("archive/a\nb"), "its archive names"),
    "another folder": (lambda: named("other/version"), "more than one folder"),
    "a second pickle": (lambda: named("archive/x.pkl"), "not hold the one pickle"),
    "a name twice": (twice, "name twice"),
    "a comment": (lambda: GOOD[:-2] + b"\x01\x00x", "or a comment"),
    "no pickle": (
        lambda: rewritten(GOOD, lambda n, d: (n.replace("data.pkl", "data.bin"), d)),
        "not hold the one pickle",
    ),
    "a pickle of 17 MiB": (lambda: with_pickle(b"x" * 17 * 2**20), "its pickle has"),
}


@pytest.mark.parametrize(("make", "reason"), ARCHIVES.values(), ids=ARCHIVES)
def test_an_archive_that_torch_does_not_write_is_refused(
    make: Callable[[], bytes], reason: str
) -> None:
    with pytest.raises(UnsafeInputError, match=reason):
        check_archive(make())


def test_an_archive_of_torch_passes() -> None:
    check_archive(GOOD)


def test_flipped_bytes_are_refused_or_still_plain(loader: PtLoader) -> None:
    rng = np.random.default_rng(0)
    for at in rng.choice(len(GOOD), 60, replace=False).tolist():
        data = bytearray(GOOD)
        data[at] ^= int(rng.integers(1, 256))
        try:
            found = loader.load(bytes(data))
        except UnsafeInputError:
            continue
        assert isinstance(found, dict)


def test_the_child_gets_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with PtLoader() as loader:
        loader.load(saved(1))
        assert loader._child is not None
        environment = Path(f"/proc/{loader._child.pid}/environ").read_bytes()
    assert b"secret" not in environment
