"""What `submit` uploads: an allow-list, looked at without importing anything."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from esper_ray.config import RunConfig, parse_config
from esper_ray.errors import ConfigError
from esper_ray.jobs import package
from esper_ray.jobs.secrets import secret_names
from tests.cli.conftest import Command

PRIVATE = (".env", "id_rsa", "token", ".netrc", "data.csv", "model.pt", "notes.txt")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder in front of the search path, with private files in every corner."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    pkg = tmp_path / "own_package"
    for place in (pkg, pkg / "inner", pkg / ".hidden", pkg / "inner" / "__pycache__", tmp_path):
        place.mkdir(exist_ok=True)
        for name in PRIVATE:
            (place / name).write_text("private")
    (pkg / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (pkg / "inner" / "__init__.py").write_text("")
    (pkg / "inner" / "models.py").write_text("import json, torch\nimport beside\n")
    (pkg / ".hidden" / "secret.py").write_text("KEY = 1")
    (tmp_path / "beside.py").write_text("")
    return tmp_path


def config(url: str = "s3://bucket/run", **sections: Any) -> RunConfig:
    storage = {"url": url, **sections.pop("storage", {})}
    return parse_config({"run": "mine", "storage": storage, **sections})


def own(**sections: Any) -> RunConfig:
    return config(model={"factory": "own_package.inner.models:build"}, **sections)


def test_package_holds_the_run_file_and_the_sources_of_the_named_module(folder: Path) -> None:
    built = package.build(own())
    names = ["own_package/__init__.py", "own_package/inner/__init__.py"]
    names += ["own_package/inner/models.py", "run.yaml"]
    assert [*built.sizes()] == names
    assert built.installed == ("esper_ray",)
    assert built.unnamed == ("beside",)
    target = folder / "out"
    target.mkdir()
    built.write(target)
    written = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
    assert written == {*names}


def test_module_that_is_named_besides_travels_too(folder: Path) -> None:
    built = package.build(own(), ["beside"])
    assert "beside.py" in built.sources
    assert built.unnamed == ()


def test_links_are_not_followed(folder: Path) -> None:
    (folder / "own_package" / "twice").symlink_to(folder / "own_package" / "inner")
    (folder / "own_package" / "again.py").symlink_to(folder / "beside.py")
    (folder / "linked.py").symlink_to(folder / "beside.py")
    (folder / "linked_package").symlink_to(folder / "own_package")
    assert not any("twice" in name or "again" in name for name in package.build(own()).sources)
    for name in ("linked", "linked_package"):
        with pytest.raises(ConfigError, match="is a link"):
            package.build(own(), [name])


def test_own_package_is_uploaded_once_where_it_is_named() -> None:
    built = package.build(config(), ["esper_ray"])
    assert "esper_ray/storage/filesystem.py" in built.sources
    assert {PurePosixPath(name).parts[0] for name in built.sources} == {"esper_ray"}
    assert built.installed == ()
    real = [path.resolve() for path in built.sources.values()]
    assert len(real) == len({*real})


def test_module_of_an_installed_distribution_must_be_on_the_cluster() -> None:
    assert package.build(config(model={"factory": "torch.nn:Linear"})).installed == (
        "esper_ray",
        "torch",
    )


@pytest.mark.parametrize(
    ("modules", "match"),
    [
        (["no_such_module"], "'no_such_module' is not found here"),
        (["../etc"], "is not found here"),
        (["broken"], "is not Python"),
        (["large"], "more than"),
    ],
)
def test_module_that_cannot_be_uploaded_is_named(
    folder: Path, modules: list[str], match: str
) -> None:
    (folder / "broken.py").write_text("def (")
    (folder / "large.py").write_text("x = 1\n" * 3_000_000)
    with pytest.raises(ConfigError, match=match):
        package.build(own(), modules)


@pytest.mark.parametrize("url", ["", "runs/mine", "memory://run", "./store"])
def test_storage_that_would_end_with_the_job_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="would end with the job"):
        package.run_file(config(url))


@pytest.mark.parametrize("url", ["s3://bucket/x", "gs://bucket/x", "/shared/x", "file:///shared/x"])
def test_storage_that_outlives_the_job_is_taken(url: str) -> None:
    stored = yaml.safe_load(package.run_file(config(url)))
    assert stored["storage"]["url"] == url
    assert stored["cluster"]["address"] == "auto"


def test_uploaded_run_file_means_the_same_run() -> None:
    given = own(train={"epochs": 7, "lr": 1e-05}, seeds={"targets": ["a.*"]})
    read = parse_config(yaml.safe_load(package.run_file(given)))
    assert read.identity() == given.identity()
    assert (read.train.epochs, read.cluster.address) == (7, "auto")


@pytest.mark.parametrize(
    "storage",
    [
        {"options": {"key": "AKIA", "secret": "s"}},
        {"options": {"client_kwargs": {"aws_secret_access_key": "s"}}},
        {"options": {"connection_string": "AccountKey=x"}},
        {"options": {"token": {"private": "x"}}},
        {"options": {"endpoint_url": "https://me:pass@host"}},
        {"replica_options": {"sas_token": "x"}},
        {"url": "s3://key:secret@bucket/x"},
    ],
)
def test_secrets_of_the_run_file_are_refused_and_not_repeated(storage: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="looks like a secret") as caught:
        package.run_file(config(storage=storage))
    assert "AKIA" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        {"anon": True, "endpoint_url": "http://host:9000"},
        {"token": "anon"},
        {"token": "google_default"},
        {"key": None, "use_ssl": False},
        {"signing_key_env": "NAME", "signing_key_file": "/etc/key"},
        ["a@b", {"tokens": 5}],
    ],
)
def test_what_only_says_how_to_reach_a_store_is_no_secret(value: object) -> None:
    assert [*secret_names(value)] == []


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=12)


@given(parts=st.lists(NAMES | st.sampled_from([".git", "a.py", ".x.py", "key.pem"]), min_size=1))
def test_nothing_hidden_and_nothing_but_python_is_ever_wanted(parts: list[str]) -> None:
    path = "/".join(parts)
    if package.wanted(path):
        assert path.endswith(".py")
        assert not any(part.startswith(".") for part in PurePosixPath(path).parts)


@pytest.mark.parametrize("name", ["working_dir", "py_modules"])
def test_runtime_environment_with_files_of_its_own_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        package.environment(Path("x"), {name: "y"})


def test_runtime_environment_keeps_what_is_set() -> None:
    extra = {"env_vars": {"A": "1"}, "pip": ["x"], "excludes": [".git"]}
    made = package.environment(Path("/x"), extra)
    assert made == {
        "env_vars": {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "A": "1"},
        "pip": ["x"],
        "working_dir": "/x",
    }


# ------------------------------------------------------------------ the command


def test_dry_run_lists_and_connects_to_nothing(cli: Command, here: Path) -> None:
    set_url = ("--set", "storage.url=/shared/tiny")
    done = cli("submit", "run.yaml", "--dry-run", "--json", *set_url, "--address", "nowhere")
    assert done.code == 0
    document = json.loads(done.stdout)
    assert [*document["files"]] == ["run.yaml"]
    assert document["installed"] == ["esper_ray"]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ((), "would end with the job"),
        (("--set", "storage.url=/x", "--runtime-env", "none.yaml"), "cannot read the runtime"),
        (("--set", "storage.url=/x", "--runtime-env", "list.yaml"), "is no runtime environment"),
        (("--set", "storage.url=/x", "--address", "host:8265"), "is not the URL of a job server"),
        (
            (
                "--set",
                "storage.options={secret: x}",
            ),
            "storage.options.secret looks like a secret",
        ),
    ],
)
def test_bad_submissions_are_refused(
    cli: Command, here: Path, words: tuple[str, ...], match: str
) -> None:
    (here / "list.yaml").write_text("[1]")
    done = cli("submit", "run.yaml", *words)
    assert done.code == 2
    assert match in done.stderr
    assert "Traceback" not in done.stderr
    assert os.getcwd() == str(here)
    assert sys.path
