"""A real S3 server on this machine, behind a proxy that misbehaves on demand."""

import ctypes
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import msgspec

ACCESS_KEY = "AKIDOFTHESETESTS"
SECRET_KEY = "a-secret-that-nothing-may-write-down"
BUCKET = "bucket"
_START_S = 60

Fault = Literal["busy", "slow", "refused", "unanswered", "cut off", "no conditional PUT"]
Behave = Callable[[str, str, Mapping[str, str]], Fault | None]
"""Chooses a fault from a request's method, path and headers."""


def free_ports(count: int) -> list[int]:
    """Find free ports."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def serve_s3(folder: Path) -> Iterator[int]:
    """Run SeaweedFS, an object store with an S3 interface, and yield its port."""
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    config = folder / "s3.json"
    config.write_bytes(msgspec.json.encode({"identities": [identity]}))
    names = ("master", "volume", "filer", "s3")
    ports = free_ports(2 * len(names))
    s3_port = ports[3]
    options = [f"-{name}.port={port}" for name, port in zip(names, ports, strict=False)]
    options += [f"-{name}.port.grpc={port}" for name, port in zip(names, ports[4:], strict=True)]
    options += [f"-{name}.localSocket={folder}/{name}.sock" for name in ("filer", "s3")]
    command = [
        str(Path(sys.executable).with_name("weed")),
        "-logtostderr",
        "server",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-filer",
        "-s3",
        f"-s3.config={config}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-metricsPort=0",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=64",
        "-volume.max=100",
        *options,
    ]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, preexec_fn=_die_with_parent
        )
    try:
        deadline = time.monotonic() + _START_S
        while not _answers(s3_port):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield s3_port
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        for port in ports[4:]:
            for path in Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock"):
                path.unlink()


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies without cleaning up."""
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == http.HTTPStatus.OK
    except OSError:
        return False
    finally:
        connection.close()


@dataclass(kw_only=True)
class ObjectStore:
    """The server behind the proxy. A test sets the proxy's behaviour and reads the requests."""

    port: int
    behave: Behave | None = None
    num_faults: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of each request."""

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which a process reaches the store."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def uri(self, path: Path) -> str:
        """Return the URI of a folder for one test, named after its local one."""
        return f"s3://{BUCKET}{path}"


def flaky(seed: int, share: float) -> Behave:
    """Fail a share of all requests, in every way that a retry can repair."""
    rng, lock = random.Random(seed), threading.Lock()
    kinds: list[Fault] = ["busy", "slow", "refused", "unanswered", "cut off"]

    def behave(method: str, path: str, headers: Mapping[str, str]) -> Fault | None:
        with lock:
            return rng.choice(kinds) if rng.random() < share else None

    return behave


@contextmanager
def serve_proxy(server_port: int) -> Iterator[ObjectStore]:
    """Forward requests to a server, except where the object store's `behave` names a fault."""
    store = ObjectStore(port=0)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self) -> None:
            content = self._read_body()
            store.requests.append((self.command, self.path))
            headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
            fault = store.behave(self.command, self.path, headers) if store.behave else None
            store.num_faults += fault is not None
            if fault == "refused":
                self.close_connection = True
                return
            if fault == "busy":
                self._fail(503, "SlowDown", "Please reduce your request rate.")
                return
            if fault == "no conditional PUT":
                self._fail(501, "NotImplemented", "A header you provided is not implemented.")
                return
            if fault == "slow":
                time.sleep(0.3)
            self._forward(content, headers, fault)

        def _read_body(self) -> bytes:
            """Read a request's body; a chunked one keeps its framing."""
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while True:
                size = self.rfile.readline()
                chunk = self.rfile.read(int(size, 16)) + self.rfile.readline()
                body += size + chunk
                if int(size, 16) == 0:
                    return body

        def _forward(self, content: bytes, headers: dict[str, str], fault: Fault | None) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", server_port, timeout=60)
            try:
                connection.request(self.command, self.path, content, headers)
                answer = connection.getresponse()
                body = answer.read()
            finally:
                connection.close()
            if fault == "unanswered":
                self.close_connection = True
                return
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            is_head = self.command == "HEAD"
            length = answer.getheader("Content-Length") if is_head else str(len(body))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            if not is_head:
                self.wfile.write(body[: len(body) // 2] if fault == "cut off" else body)
            self.close_connection |= fault == "cut off"

        def _fail(self, status: int, code: str, message: str) -> None:
            body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            self.send_response_only(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request

        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionError):
                super().handle()

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    proxy.daemon_threads = True
    store.port = proxy.server_address[1]
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()


@contextmanager
def environment_of(store: ObjectStore) -> Iterator[None]:
    """Set the store's environment variables in this process and those that it starts."""
    before = {name: os.environ.get(name) for name in store.environment}
    os.environ.update(store.environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
