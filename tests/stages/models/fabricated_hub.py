"""A local Hugging Face hub with one repository, and a process that talks to it."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(kw_only=True)
class Hub:
    """A hub's content and its answers."""

    kind: Literal["models", "datasets"]
    repo: str
    files: dict[str, bytes]
    lfs: Collection[str]
    """Names of the files in large file storage; the hub knows their sha256."""
    commit: str = COMMIT
    downloads: list[str] = field(default_factory=list)
    token: str = ""
    """Allows writing, once the repository has been created. If empty, nobody can write."""
    is_private: bool | None = None
    """Set when the repository is created; None before that."""
    commits: list[str] = field(default_factory=list)
    """Summaries of the uploads' commits."""
    endpoint: str = ""

    def describe(self, name: str) -> dict[str, object]:
        content = self.files[name]
        described: dict[str, object] = {
            "type": "file",
            "path": name,
            "rfilename": name,
            "size": len(content),
            "oid": hashlib.sha1(content).hexdigest(),
            "blobId": hashlib.sha1(content).hexdigest(),
        }
        if name in self.lfs:
            sha256 = hashlib.sha256(content).hexdigest()
            described["lfs"] = {
                "oid": sha256,
                "sha256": sha256,
                "size": len(content),
                "pointerSize": 134,
            }
        return described

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        if self.token and self.is_private is None:
            return 404, b"{}", {"X-Error-Code": "RepoNotFound"}
        described = [self.describe(name) for name in self.files]
        api = f"/api/{self.kind}/{self.repo}"
        if path in (f"{api}/revision/main", f"{api}/revision/{self.commit}", api):
            info = {"id": self.repo, "sha": self.commit, "siblings": described}
            return 200, json.dumps(info).encode(), {}
        if path == f"{api}/tree/{self.commit}":
            return 200, json.dumps(described).encode(), {}
        folder = self.repo if self.kind == "models" else f"{self.kind}/{self.repo}"
        name = path.removeprefix(f"/{folder}/resolve/{self.commit}/")
        if name in self.files:
            file = self.describe(name)
            lfs = file.get("lfs")
            etag = lfs["oid"] if isinstance(lfs, dict) else file["oid"]
            return 200, self.files[name], {"X-Repo-Commit": self.commit, "ETag": f'"{etag}"'}
        code = "RevisionNotFound" if path.startswith(api) else "RepoNotFound"
        return 404, b"{}", {"X-Error-Code": code}

    def may_write(self, authorization: str | None) -> bool:
        return authorization == f"Bearer {self.token}"

    def take(self, path: str, body: bytes, authorization: str | None) -> tuple[int, bytes]:
        """Answer a POST: create the repository, ask for files inside the commit, take a commit."""
        if not self.may_write(authorization):
            return 401, b'{"error": "Invalid username or password."}'
        api = f"/api/{self.kind}/{self.repo}"
        if path == "/api/repos/create":
            asked = json.loads(body)
            assert f"{asked['organization']}/{asked['name']}" == self.repo
            if self.is_private is not None:
                return 409, json.dumps({"url": f"{self.endpoint}/{self.repo}"}).encode()
            self.is_private = asked["visibility"] == "private"
            return 200, json.dumps({"url": f"{self.endpoint}/{self.repo}"}).encode()
        if path == f"{api}/preupload/main":
            answer = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return 200, json.dumps({"files": answer}).encode()
        if path == "/api/validate-yaml":
            return 200, b'{"errors": [], "warnings": []}'
        assert path == f"{api}/commit/main", path
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            else:
                self.files[value["path"]] = base64.b64decode(value["content"])
        url = f"{self.endpoint}/{self.repo}/commit/{self.commit}"
        return 200, json.dumps({"commitUrl": url, "commitOid": self.commit}).encode()

    @contextmanager
    def serve(self) -> Iterator[None]:
        """Serve the hub at `endpoint` while the block runs."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                status, content, headers = hub.answer(path)
                if path.endswith("/auth-check/write"):
                    status = 200 if hub.may_write(self.headers["Authorization"]) else 403
                self.send_response(status)
                for header, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(header, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)
                    hub.downloads.append(path.rsplit("/", 1)[-1])

            do_HEAD = do_GET

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                path = unquote(urlsplit(self.path).path)
                status, content = hub.take(path, body, self.headers["Authorization"])
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                """Keep the test's output clean."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def run(self, code: str, home: Path, **environment: str) -> str:
        """Run code in another process, because the hub's client reads its settings at import.

        Returns:
            Its standard output, or its standard error if the output is empty.
        """
        settings = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, **settings, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout or done.stderr
