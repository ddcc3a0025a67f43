"""A fake Hugging Face Hub with one repository."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NAME, COMMIT, TAG = "some-org/Tiny-R1-0.1B", "a" * 40, "b" * 40
FOLDER = "some_org_Tiny_R1_0.1B"  # as in the original
CLUTTER = {  # files of real repositories that must not be downloaded
    "model-00001-of-00001.safetensors": b"all of it in shards",
    "pytorch_model.bin": b"pickled", "consolidated.safetensors": b"all of it again", "modeling_tiny.py": b"code",
    "original/params.json": b"{}", "onnx/model.onnx": b"onnx", "README.md": b"# Tiny", ".gitattributes": b"*",
}  # fmt: skip


class Hub(ThreadingHTTPServer):
    """Serves the files of a folder as one repository with a branch, a tag and, optionally, a required token."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        self.requests, self.token, self.damage, self.break_off = [], None, None, None
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self):
        """The files whose content was requested."""
        return {
            path.split(f"/{COMMIT}/")[-1] for method, path in self.requests if method == "GET" and "/resolve/" in path
        }


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        hub, path = self.server, self.path.split("?")[0]
        hub.requests.append((self.command, path))
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.send(401, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for access"})
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self.send_metadata("/".join(parts[2:4]), parts[4:])
        if "/".join(parts[:2]) == NAME and parts[2] == "resolve":
            return self.send_file("/".join(parts[4:]))
        return self.send(404, headers={"X-Error-Code": "RepoNotFound"})

    def send_metadata(self, name, rest):
        if name != NAME:
            return self.send(404, headers={"X-Error-Code": "RepoNotFound"})
        revision = rest[1] if rest else "main"
        commit = {"main": COMMIT, COMMIT: COMMIT, "v1": TAG, TAG: TAG}.get(revision)
        if commit is None:
            return self.send(404, headers={"X-Error-Code": "RevisionNotFound"})
        if rest and rest[0] == "tree":
            entries = [
                {"type": "file", "path": p, "size": f.stat().st_size, **self.lfs(p)}
                for p, f in self.server.files.items()
            ]
            return self.send(200, json.dumps(entries).encode())
        siblings = [{"rfilename": p, "size": f.stat().st_size, **self.lfs(p)} for p, f in self.server.files.items()]
        return self.send(200, json.dumps({"id": NAME, "sha": commit, "siblings": siblings}).encode())

    def lfs(self, path):
        data = self.server.files[path].read_bytes()
        oid = hashlib.sha256(data).hexdigest()
        git = {"oid": hashlib.sha1(data).hexdigest(), "blobId": hashlib.sha1(data).hexdigest()}
        if not path.endswith("safetensors"):
            return git
        return git | {"lfs": {"oid": oid, "sha256": oid, "size": len(data), "pointerSize": 130}}

    def send_file(self, path):
        data = self.server.files[path].read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes",
            "X-Linked-Size": str(len(data)),
        }  # fmt: skip
        if path == self.server.damage:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if self.command == "GET" and path == self.server.break_off:
            self.server.break_off, self.close_connection = None, True
            return self.send(200, data, headers, cut=len(data) // 2)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.server.requests.append(("RANGE", path))
        return self.send(206 if start else 200, data[start:], headers)

    def send(self, status, body=b"", headers=None, cut=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json" if body[:1] in (b"{", b"[") else "application/octet-stream")
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
