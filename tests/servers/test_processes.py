"""What the tests do where a server is not installed, and how they end one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.servers.processes import absent, free_port, serving


def test_absent_server_is_a_counted_skip_or_where_all_are_required_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ESPER_REQUIRE_SERVERS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="weed is not installed here: pip install it"):
        absent("weed", "pip install it")
    monkeypatch.setenv("ESPER_REQUIRE_SERVERS", "1")
    with pytest.raises(pytest.fail.Exception, match="weed is not installed here: pip install it"):
        absent("weed", "pip install it")


SERVE = """
import http.server, os, sys
print(os.getpid(), flush=True)
handler = http.server.BaseHTTPRequestHandler  # which refuses everything
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), handler).serve_forever()
"""


def test_server_answers_inside_the_block_and_is_gone_after_it(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-c", SERVE, str(port)]
    with serving(command, f"http://127.0.0.1:{port}/", tmp_path / "log"):
        pid = int((tmp_path / "log").read_text().split()[0])
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_program_that_ends_at_once_fails_with_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such option')"]
    with (
        pytest.raises(pytest.fail.Exception, match=r"exit status 1\):\nno such option"),
        serving(command, f"http://127.0.0.1:{free_port()}/", tmp_path / "log"),
    ):
        pass
