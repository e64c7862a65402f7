"""Reaching a cluster: addresses, tokens, and what is said where resources are short."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper_ray.actors import placement
from esper_ray.actors.placement import Cluster, ClusterSettings
from esper_ray.actors.tokens import use_token
from esper_ray.errors import ClusterUnavailable, first_line

# ------------------------------------------------------------------ addresses


class Listener:
    """A server on 127.0.0.1 that answers every connection with the same bytes, or not at all."""

    def __init__(self, answer: bytes | None) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._answer = answer
        self._kept: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            while True:
                connection, _ = self._socket.accept()
                self._kept.append(connection)
                if self._answer is not None:
                    connection.recv(64)
                    connection.sendall(self._answer)
        except OSError:
            return  # closed

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()
        for connection in self._kept:
            connection.close()


@pytest.fixture
def listener(request: pytest.FixtureRequest) -> Iterator[Listener]:
    server = Listener(request.param)
    yield server
    server.close()


SETTINGS = b"\0\0\0\x04\0\0\0\0\0"


@pytest.mark.parametrize("listener", [SETTINGS], indirect=True)
def test_server_that_speaks_http2_may_be_ray(listener: Listener) -> None:
    placement._check_reachable(listener.address)


@pytest.mark.parametrize("listener", [b"HTTP/1.1 400 Bad Request\r\n\r\n"], indirect=True)
def test_server_of_another_kind_is_refused_at_once(listener: Listener) -> None:
    with pytest.raises(ClusterUnavailable, match="something else than Ray listens there"):
        placement._check_reachable(listener.address)


@pytest.mark.parametrize("listener", [None], indirect=True)
def test_silent_server_is_refused_in_time(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "_CONNECT_S", 0.1)
    with pytest.raises(ClusterUnavailable, match="timed out"):
        placement._check_reachable(listener.address)


@pytest.mark.parametrize("listener", [None], indirect=True)
def test_server_behind_tls_is_left_to_ray(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")
    placement._check_reachable(listener.address)


def test_failure_to_reach_a_cluster_leaves_other_connections_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    def not_ours() -> None:
        raise AssertionError("this connection is not ours to end")

    monkeypatch.setattr(ray, "shutdown", not_ours)
    cluster = Cluster(ClusterSettings("127.0.0.1:1", 1.0, 1.0))
    with pytest.raises(ClusterUnavailable, match=r"127\.0\.0\.1:1"):
        cluster.connect(2)
    cluster.close()


# ------------------------------------------------------------------ tokens

TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and none of Ray's variables; what is set is taken back."""
    for name in TOKEN_VARIABLES:
        monkeypatch.setenv(name, "")  # so that the end of the test restores it
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def auth() -> dict[str, str]:
    return {name: os.environ[name] for name in TOKEN_VARIABLES if name in os.environ}


def test_private_cluster_gets_a_token_of_its_own(home: Path) -> None:
    use_token(private=True)
    first = auth()
    assert first["RAY_AUTH_MODE"] == "token"
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert list(home.iterdir()) == []
    use_token(private=True)
    assert auth() == first


def test_cluster_of_others_is_joined_without_a_token_where_none_exists(home: Path) -> None:
    use_token(private=False)
    assert auth() == {}


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("source", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "file"])
def test_known_token_is_used_and_kept(
    home: Path, monkeypatch: pytest.MonkeyPatch, private: bool, source: str
) -> None:
    if source == "file":
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text("known")
    else:
        (home / "token").write_text("known")
        monkeypatch.setenv(source, str(home / "token"))
    given = auth()
    use_token(private=private)
    assert auth() == {**given, "RAY_AUTH_MODE": "token"}


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_named_token_file_that_holds_none_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    if content is not None:
        (home / "token").write_text(content)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "token"))
    with pytest.raises(ClusterUnavailable, match=r"token file .* (cannot be read|is empty)"):
        use_token(private=False)


def test_mode_that_the_user_chose_stays(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    use_token(private=True)
    assert auth()["RAY_AUTH_MODE"] == "disabled"


# ------------------------------------------------------------------ words


def test_shortage_says_what_is_needed_and_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "memory": 1.0})
    monkeypatch.setattr(ray, "available_resources", dict)
    assert placement._shortage(4, "CPU", 1.5) == "need 4 CPU, cluster has 2 (0 free) after 2 s"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConnectionError("one\ntwo"), "one"),
        (ConnectionError(), "ConnectionError"),
        (ValueError("x"), "x"),
    ],
)
def test_only_the_first_line_of_an_error_is_shown(error: Exception, line: str) -> None:
    assert first_line(error) == line
