"""A stand-in for the Hugging Face Hub: serves the files of one dictionary, as huggingface_hub asks for them."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """`files`: content by OWNER/REPO/FILE; `gated`: repositories without access; `requests`: method, range and path."""

    def __init__(self, files: dict[str, bytes], gated: tuple[str, ...] = ()):
        self.files, self.gated, self.requests = files, gated, []
        self.address = ""

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
def serving(files: dict[str, bytes], gated: tuple[str, ...] = ()) -> Iterator[HubServer]:
    """Serves until the block ends; `address` of the result is what HF_ENDPOINT should be."""
    hub = HubServer(files, gated)

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._respond(with_content=False)

        def do_GET(self) -> None:
            self._respond(with_content=True)

        def _respond(self, *, with_content: bool) -> None:
            wanted = self.headers.get("Range")
            hub.requests.append((self.command, wanted, self.path))
            status, code, content = hub.answer(urlparse(self.path).path)
            start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted and status == 200 else 0
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
                self.wfile.write(content[start:])

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
