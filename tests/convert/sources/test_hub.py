"""Names of the hub: only what is needed is fetched, and a copy that was kept serves offline."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support.patience import PATIENCE

ROOT = Path(__file__).parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"other weights",
    "onnx/model.onnx": b"third weights",
    "small.gguf": b"GGUF",
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as its client asks for; `me/model` and `me/quantized`."""

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        path = urlsplit(self.path).path
        start, _, name = path.partition(f"/resolve/{COMMIT}/")
        if path.startswith("/api/models/me/quantized/tree/"):
            row = {"type": "file", "path": "small.gguf", "size": 4, "oid": "a"}
            return self._send(json.dumps([row]).encode())
        if path.startswith("/api/models/me/model/tree/"):
            rows = [{"type": "file", "path": n, "size": len(c), "oid": n} for n, c in FILES.items()]
            return self._send(json.dumps(rows).encode())
        if path.startswith("/api/models/me/model"):
            siblings = [{"rfilename": name} for name in FILES]
            told = {"id": "me/model", "sha": COMMIT, "siblings": siblings, "private": False}
            return self._send(json.dumps(told).encode())
        name = name or path.partition("/resolve/main/")[2]
        if "me/model" in start and name in FILES:
            return self._send(FILES[name])
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def _send(self, content):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{len(content)}{content[:1].hex()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    found = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}"
    found.shutdown()


ASK = """
import sys
from mor_jax.convert.sources.hub import locate_model
for name in sys.argv[1:]:
    try:
        path = locate_model(name)
        print(sorted(p.name for p in path.iterdir()) if path.is_dir() else path.read_bytes())
    except ValueError as error:
        print(error)
"""


def ask(home, endpoint, *names, **environment):
    """What `locate_model` gives for each of `names`: one line each."""
    told = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(ROOT)}
    told |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment
    command = [sys.executable, "-c", ASK, *names]
    done = subprocess.run(
        command, env=os.environ | told, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_repositories_are_fetched_and_kept(server, tmp_path):
    lines = ask(tmp_path, server, "me/model", "me/model/small.gguf", "me/absent", "me/quantized")
    assert lines[0] == "['config.json', 'model.safetensors', 'tokenizer.json']"
    assert lines[1] == "b'GGUF'"
    assert (
        "path='me/absent': does not exist as a path, and downloading it from the hub failed"
        in lines[2]
    )
    told = "path='me/quantized': contains GGUF files. Give the path of one of them with --from=gguf"
    assert lines[3] == told
    lines = ask(tmp_path, "http://127.0.0.1:9", "me/model", "me/other", HF_HUB_OFFLINE="1")
    assert "model.safetensors" in lines[0]
    assert "offline" in lines[1].lower() and "download it elsewhere" in lines[1]
