"""The question that every writer asks its store first, and a real store that cannot answer it."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper_ray.errors import CapabilityError
from esper_ray.storage.capability import check_conditional_create
from esper_ray.storage.commit_log import RunLog
from esper_ray.storage.filesystem import Root
from tests.servers.fixtures import Place


def test_every_store_of_the_contract_is_able_and_keeps_no_trace(any_root: Root) -> None:
    check_conditional_create(any_root)
    assert any_root.names("probes") == []


@pytest.mark.s3
def test_store_that_ignores_the_condition_is_refused_before_anything_is_stored(
    s3rver: Place,
) -> None:
    root = s3rver.root()
    with pytest.raises(CapabilityError, match=root.url) as caught:
        RunLog(root).open_epoch(None)
    assert "storage.single_writer: unsafe" in caught.value.hint
    assert root.names("") == []


@pytest.mark.s3
def test_single_writer_may_use_such_a_store_if_it_says_so(s3rver: Place) -> None:
    root = Root.open(f"{s3rver.url}/unsafe", s3rver.options, unsafe=True)
    log = RunLog(root)
    log.open_epoch(None)
    log.commit(1, {"step": 1}, [log.put_segment("a", b"data", "arrow")])
    assert log.open_epoch(resumed_from=1).run_epoch == 2
    with pytest.raises(FileExistsError):
        root.create("epochs/00000001.json", b"other")
    assert RunLog(root).lineage() == [1]


@pytest.mark.s3
def test_user_reads_what_the_store_lacks(s3rver: Place, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from esper_ray.cli import main
    from tests.cli.conftest import RUN_FILE

    run = tmp_path / "run.yaml"
    run.write_text(RUN_FILE)
    words = ["train", str(run), "--local", "--set", f"storage.url={s3rver.url}/refused"]
    options = ", ".join(f"{key}: {value}" for key, value in s3rver.options.items())
    done = CliRunner().invoke(main, [*words, "--set", f"storage.options={{{options}}}"])
    assert done.exit_code == 2
    assert "overwrites objects that it was told to create" in done.stderr
    assert "single_writer: unsafe" in done.stderr
