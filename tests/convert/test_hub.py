"""Hub ids: downloaded from a local server that speaks the hub's protocol, then found in the cache without it."""

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from metis_home.convert.hub import is_hub_id
from tests.convert.pico import shapes, snapshot, write_dense

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "org/pico-vl"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve one repository; yields its address and the paths that were asked for."""
    names = sorted(shapes())
    content = write_dense(tmp_path / "served", groups=[names[:20], names[20:]])
    (content / "modeling_evil.py").write_text("raise SystemExit")
    (content / "pytorch_model.bin").write_bytes(b"pickle")
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            asked.append(self.path)
            path = self.path.split("?")[0]
            headers = {"X-Repo-Commit": COMMIT}
            if path.startswith(f"/api/models/{REPOSITORY}"):
                files = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40}
                    for f in content.iterdir()
                ]
                data = (
                    files
                    if "/tree/" in path
                    else {"id": REPOSITORY, "sha": COMMIT, "siblings": [{"rfilename": f["path"]} for f in files]}
                )
                payload, headers["Content-Type"] = json.dumps(data).encode(), "application/json"
            elif path.startswith(f"/{REPOSITORY}/resolve/") and (content / path.rsplit("/", 1)[1]).is_file():
                payload = (content / path.rsplit("/", 1)[1]).read_bytes()
                headers["ETag"] = f'"{hashlib.sha256(payload).hexdigest()}"'
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            if body:
                self.wfile.write(payload)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def run(address: str, cache: Path, *arguments: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: huggingface_hub reads its environment once."""
    code = "import sys; from metis_home.cli import main; main(sys.argv[1:])"
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(cache), "PATH": "/usr/bin:/bin", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=root, env=environment, capture_output=True, text=True
    )


def test_a_hub_id_is_downloaded_converted_and_given_back(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = hub
    out, cache = tmp_path / "two", tmp_path / "cache"

    done = run(address, cache, "convert", f"{REPOSITORY}@main", str(out))
    assert done.returncode == 0, done.stderr
    offline = run(address, cache, "convert", REPOSITORY, str(tmp_path / "again"), offline=True)
    assert offline.returncode == 0, offline.stderr
    back = run(address, cache, "split", str(out), str(tmp_path / "back"))
    assert back.returncode == 0, back.stderr

    served = {n: d for n, d in snapshot(tmp_path / "served").items() if not n.endswith((".py", ".bin"))}
    assert snapshot(tmp_path / "back") == served
    assert not [path for path in asked if ".bin" in path.split("/resolve/")[-1] or path.endswith(".py")]
    manifest = json.loads((out / "metis_home_manifest.json").read_text())
    assert manifest["branches"]["thinking"]["source"] == REPOSITORY
    assert manifest["branches"]["thinking"]["revision"] == COMMIT
    card = (out / "README.md").read_text()
    assert f'base_model: ["{REPOSITORY}"]' in card
    assert str(tmp_path) not in card + json.dumps(manifest)


def test_an_unknown_repository_is_one_clear_message(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    done = run(hub[0], tmp_path / "cache", "convert", "org/nothing", str(tmp_path / "two"))

    assert done.returncode == 1
    assert "neither a directory nor a repository" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("where", ["../x", "a/../b", "/abs/path", "a/b/c", "./a/b", "a", "a/b@../x"])
def test_paths_are_no_hub_ids(where: str) -> None:
    assert not is_hub_id(where)
