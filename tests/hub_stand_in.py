"""A Hugging Face Hub on this machine: what its client asks of it for models of one revision, over HTTP."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """`served`: the bytes of each file that were given out."""

    def __init__(self, repo: str, directory: Path) -> None:
        self.repo = repo
        self.directory = directory
        self.served: Counter[str] = Counter()

    def answer(self, path: str, wanted: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a request; `wanted` is its Range."""
        path = path.partition("?")[0]
        files = sorted(file for file in self.directory.iterdir() if file.is_file())
        if path in (f"/api/models/{self.repo}/revision/{revision}" for revision in ("main", COMMIT)):
            siblings = [{"rfilename": file.name, "size": file.stat().st_size} for file in files]
            return 200, {}, json.dumps({"id": self.repo, "sha": COMMIT, "siblings": siblings}).encode()
        if path == f"/api/models/{self.repo}/tree/{COMMIT}":
            entries = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": self._oid(f)} for f in files]
            return 200, {}, json.dumps(entries).encode()
        name = path.removeprefix(f"/{self.repo}/resolve/{COMMIT}/")
        file = self.directory / name
        if name == path or not file.is_file():
            return 404, {"X-Error-Code": "RepoNotFound" if self.repo not in path else "EntryNotFound"}, b""
        content, headers = file.read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": f'"{self._oid(file)}"'}
        if bounds := re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or ""):
            first, last = int(bounds[1]), min(int(bounds[2]), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return 206, headers, content[first : last + 1]
        return 200, headers, content

    def _oid(self, file: Path) -> str:
        return hashlib.sha1(file.name.encode()).hexdigest()


@contextmanager
def hub(repo: str, directory: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The client of this process asks this hub, which has one model, and keeps what it downloads in `cache`."""
    stand_in = Hub(repo, directory)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = stand_in.answer(self.path, self.headers.get("Range"))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                stand_in.served[self.path.rpartition("/")[2]] += len(body)
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()
