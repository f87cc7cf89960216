"""A stand-in for the Hugging Face Hub on this machine: serves the files of a dictionary as huggingface_hub asks."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

import pytest

from top_jax.convert import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """`files`: content by OWNER/REPO/FILE; `gated`: repositories without access; `requests`: method and path."""

    def __init__(self, files: dict[str, bytes], gated: tuple[str, ...]):
        self.files, self.gated, self.requests = files, gated, []
        self.breaks_after: int | None = None  # bytes of the next download, which then ends

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Returns status, error code and content for /OWNER/REPO/resolve/REVISION/FILE."""
        owner, name, _, revision, *file = path.strip("/").split("/")
        repository = f"{owner}/{name}"
        if repository in self.gated:
            return 403, "GatedRepo", b""
        if not any(key.startswith(f"{repository}/") for key in self.files):
            return 404, "RepoNotFound", b""
        if revision not in ("main", COMMIT):
            return 404, "RevisionNotFound", b""
        content = self.files.get("/".join([repository, *file]))
        return (404, "EntryNotFound", b"") if content is None else (200, "", content)


@contextmanager
def serving(
    patch: pytest.MonkeyPatch, cache: Path, files: dict[str, bytes], gated: tuple[str, ...] = ()
) -> Iterator[HubServer]:
    """Has huggingface_hub ask this server only, with a cache of its own, until the block ends."""
    constants = pytest.importorskip("huggingface_hub.constants")
    served = HubServer(files, gated)

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._respond(with_content=False)

        def do_GET(self) -> None:
            self._respond(with_content=True)

        def _respond(self, *, with_content: bool) -> None:
            served.requests.append((self.command, self.path))
            status, code, content = served.answer(urlparse(self.path).path)
            wanted = self.headers.get("Range") if status == 200 else None
            start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
            self.send_response(206 if start else status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if with_content:
                end, served.breaks_after = served.breaks_after, None
                self.wfile.write(content[start:][:end])

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    patch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # else it asks huggingface.co which programs are agents
    hub._download.cache_clear()  # nothing is resolved yet in this process
    try:
        yield served
    finally:
        hub._download.cache_clear()
        server.shutdown()
        server.server_close()
        thread.join()
