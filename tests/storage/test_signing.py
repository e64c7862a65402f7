"""Signed runs: what others wrote or changed is refused by who holds the key."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from esper_ray.config import parse_config
from esper_ray.errors import ConfigError, CorruptError, SignatureError
from esper_ray.runtime import Runtime
from esper_ray.storage import (
    Root,
    RunCheckpoints,
    RunLog,
    SigningKey,
    copy_commit,
    copy_run,
    manifest,
    pins,
)
from tests.hostile.stored_run import make_run, resume, run_config
from tests.storage.conftest import store

KEY, OTHER = SigningKey(b"k" * 16), SigningKey(b"o" * 16)


def signed_log(folder: Path, key: SigningKey | None = KEY) -> RunLog:
    log = RunLog(Root.open(str(folder)), key=key)
    log.open_epoch(None)
    store(log, seq=1, step=10)
    store(log, seq=2, step=20)
    return log


def reader(folder: Path, key: SigningKey | None) -> RunCheckpoints:
    return RunCheckpoints(RunLog(Root.open(str(folder)), key=key))


def test_a_signed_run_reads_with_its_key_and_without_any(tmp_path: Path) -> None:
    signed_log(tmp_path)
    for key in (KEY, None):
        found = reader(tmp_path, key)
        assert found.load(found.resolve("latest"))["step"] == 20
        assert found.verify() == []
    assert "signature" not in RunLog(Root.open(str(tmp_path)), key=KEY).read_commit(1)


@pytest.mark.parametrize(
    ("written", "read", "reason"),
    [(None, KEY, "is not signed"), (OTHER, KEY, "signed with another key")],
)
def test_a_run_of_another_key_is_refused(
    tmp_path: Path, written: SigningKey | None, read: SigningKey, reason: str
) -> None:
    signed_log(tmp_path, written)
    with pytest.raises(SignatureError, match=reason):
        reader(tmp_path, read).resolve("latest")
    with pytest.raises(SignatureError, match=reason):
        RunLog(Root.open(str(tmp_path)), key=read).read_commit(2)
    problems = {p["object"]: p["problem"] for p in reader(tmp_path, read).verify()}
    assert reason in problems["commits/00000000000000000001.json"]


CHANGES: dict[str, Any] = {
    "another step": lambda body: body.update(step=30),
    "another time": lambda body: body.update(time="2000-01-01T00:00:00+00:00"),
    "one more field": lambda body: body.update(more=1),
    "a segment less": lambda body: body["segments"].pop(),
    "no signature": lambda body: body.pop("signature"),
    "another algorithm": lambda body: body["signature"].update(algorithm="none"),
    "no mac": lambda body: body["signature"].update(mac=None),
    "an empty mac": lambda body: body["signature"].update(mac=""),
    "a mac of other letters": lambda body: body["signature"].update(mac="é" * 64),
    "a list for a signature": lambda body: body.update(signature=[]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_forged_commit_is_passed_over_for_the_one_before(tmp_path: Path, change: Any) -> None:
    signed_log(tmp_path)
    path = tmp_path / "commits/00000000000000000002.json"
    body = copy.deepcopy(manifest.decode(path.read_bytes()))
    change(body)
    path.write_bytes(manifest.encode(body))
    told: list[str] = []
    newest = reader(tmp_path, KEY).newest_valid(told.append)
    assert newest is not None
    assert newest[0] == 1
    assert "signed" in told[0]
    assert newest[1]["step"] == 10


def test_a_commit_of_a_signed_run_can_be_pinned(tmp_path: Path) -> None:
    pins.pin(signed_log(tmp_path).root, "good", 1)
    for key in (KEY, None):
        assert reader(tmp_path, key).resolve("good") == 1
        assert reader(tmp_path, key).verify() == []


def test_a_commit_that_a_signed_run_gave_up_is_not_copied_alone(tmp_path: Path) -> None:
    log = signed_log(tmp_path / "run")
    copy_commit(log.root, Root.open(str(tmp_path / "two")), 2)
    log.open_epoch(1)
    with pytest.raises(ConfigError, match="takes the key"):
        copy_commit(log.root, Root.open(str(tmp_path / "given-up")), 2)
    copy_run(log.root, Root.open(str(tmp_path / "all")))
    for folder, newest in (("two", 2), ("all", 1)):
        assert reader(tmp_path / folder, KEY).resolve("latest") == newest


def test_a_commit_is_not_valid_in_the_place_of_another(tmp_path: Path) -> None:
    signed_log(tmp_path)
    one, two = (tmp_path / f"commits/{seq:020d}.json" for seq in (1, 2))
    two.write_bytes(one.read_bytes())
    with pytest.raises(CorruptError, match="not the manifest of commit 2"):
        reader(tmp_path, KEY).load(2)


def test_a_key_that_can_be_guessed_is_refused_and_none_is_shown() -> None:
    with pytest.raises(ConfigError, match="of 15 bytes is too short"):
        SigningKey(b"x" * 15)
    assert "kkk" not in repr(KEY)


def test_a_run_signs_and_resumes_by_the_key_that_its_file_names(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"a key of 32 random bytes, or so\n")
    (tmp_path / "other").write_bytes(b"another key of as many bytes....")
    make_run(tmp_path / "run", signing_key_file=str(tmp_path / "key"))
    seq, told, _ = resume(tmp_path / "run", signing_key_file=str(tmp_path / "key"))
    assert seq == 4
    assert "resuming" in told[-1]
    with pytest.raises(SignatureError, match="another key"):
        resume(tmp_path / "run", signing_key_file=str(tmp_path / "other"))


def test_a_key_comes_from_the_environment_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUN_KEY", "0123456789abcdef")
    with Runtime(run_config(tmp_path, signing_key_env="RUN_KEY"), local=True) as runtime:
        assert runtime._key == SigningKey(b"0123456789abcdef")
    monkeypatch.setenv("RUN_KEY", " ")
    with pytest.raises(ConfigError, match="RUN_KEY holds no signing key"):
        Runtime(run_config(tmp_path, signing_key_env="RUN_KEY"), local=True)
    with pytest.raises(ConfigError, match="cannot be read"):
        Runtime(run_config(tmp_path, signing_key_file=str(tmp_path / "absent")), local=True)
    both = {"signing_key_env": "A", "signing_key_file": "b"}
    with pytest.raises(ConfigError, match="both given"):
        parse_config({"run": "a", "storage": both})
