"""Models from the Hub, with the Hub's own client and a server that answers as the Hub does: pytest tests/test_hub.py"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from support import tiny_model, tiny_tokenizer

from rsft_lib.checkpoint import hub
from rsft_lib.checkpoint.convert import convert
from rsft_lib.common.artifact import read_manifest, verify

NAME, COMMIT, TAG = "some-org/Tiny-R1-0.1B", "a" * 40, "b" * 40
FOLDER = "some_org_Tiny_R1_0.1B"  # as the original names it
CLUTTER = {  # what repositories also hold, and nobody needs here
    "model-00001-of-00001.safetensors": b"all of it in shards",
    "pytorch_model.bin": b"pickled", "consolidated.safetensors": b"all of it again", "modeling_tiny.py": b"code",
    "original/params.json": b"{}", "onnx/model.onnx": b"onnx", "README.md": b"# Tiny", ".gitattributes": b"*",
}  # fmt: skip


class Hub(ThreadingHTTPServer):
    """Serves the files of a folder as one repository with a branch, a tag and, if asked, a token."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        self.requests, self.token, self.damage, self.break_off = [], None, None, None
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self):
        """The files whose content was asked for."""
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
            return self.tell("/".join(parts[2:4]), parts[4:])
        if "/".join(parts[:2]) == NAME and parts[2] == "resolve":
            return self.give("/".join(parts[4:]))
        return self.send(404, headers={"X-Error-Code": "RepoNotFound"})

    def tell(self, name, rest):
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

    def give(self, path):
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


def point_to(endpoint, monkeypatch):
    """What HF_ENDPOINT does when the library is imported."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def server(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    tiny_model(repository)
    tiny_tokenizer(repository)
    for name, content in CLUTTER.items():
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(content)
    server = Hub(repository)
    point_to(server.endpoint, monkeypatch)
    monkeypatch.setattr(hub, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_is_downloaded_by_name_with_only_the_files_that_are_needed(server, tmp_path):
    folder = hub.model_folder(NAME)
    assert folder == tmp_path / "checkpoints" / FOLDER
    needed = {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    assert server.fetched() == needed and {path.name for path in folder.iterdir()} == needed | {"manifest.json"}
    assert all((folder / name).read_bytes() == server.files[name].read_bytes() for name in needed)
    manifest = verify(folder)
    assert (manifest["name"], manifest["revision"], manifest["commit"]) == (NAME, "main", COMMIT)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [FOLDER]
    assert convert(folder, tmp_path / "megatron")["weights"] == 31


def test_what_is_there_is_used_without_asking_the_hub(server):
    folder = hub.model_folder(NAME)
    server.requests.clear()
    assert hub.model_folder(NAME) == hub.model_folder(NAME, COMMIT) == hub.model_folder(str(folder)) == folder
    assert server.requests == []


def test_another_revision_or_a_folder_with_a_hole_is_downloaded(server):
    folder = hub.model_folder(NAME)
    hub.model_folder(NAME, "v1")
    assert read_manifest(folder)["commit"] == TAG
    (folder / "model.safetensors").unlink()
    server.requests.clear()
    hub.model_folder(NAME, "v1")
    assert server.requests and verify(folder)


def test_bin_files_are_taken_where_there_is_nothing_else(server):
    del server.files["model.safetensors"], server.files["model-00001-of-00001.safetensors"]
    folder = hub.model_folder(NAME)
    assert (folder / "pytorch_model.bin").read_bytes() == b"pickled"


def test_a_connection_that_breaks_off_is_taken_up_where_it_was(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    server.break_off = "model.safetensors"
    verify(hub.model_folder(NAME))
    assert [path for method, path in server.requests if method == "RANGE"] == ["model.safetensors"]


def test_a_download_that_was_killed_goes_on_with_the_files_that_are_missing(server, tmp_path, monkeypatch):
    real = huggingface_hub.file_download.http_get

    def pulled_out(url, *args, **kwargs):
        if url.endswith("model.safetensors"):
            raise ConnectionError("the cable was pulled out")
        return real(url, *args, **kwargs)

    with monkeypatch.context() as cable, pytest.raises(FileNotFoundError, match="the cable was pulled out"):
        cable.setattr(huggingface_hub.file_download, "http_get", pulled_out)
        hub.model_folder(NAME)
    assert not (tmp_path / "checkpoints" / FOLDER).exists()
    before = server.fetched()
    server.requests.clear()
    verify(hub.model_folder(NAME))
    assert "model.safetensors" in server.fetched() and server.fetched().isdisjoint(before)


def test_a_file_that_came_over_damaged_is_refused_and_fetched_again_next_time(server, tmp_path):
    server.damage = "model.safetensors"
    with pytest.raises(ValueError, match="model.safetensors came over damaged"):
        hub.model_folder(NAME)
    assert not (tmp_path / "checkpoints" / FOLDER).exists()
    server.damage = None
    verify(hub.model_folder(NAME))


def test_a_model_that_asks_for_a_token_gets_it(server):
    server.token = "hf_secret"
    with pytest.raises(FileNotFoundError, match="set HF_TOKEN"):
        hub.model_folder(NAME)
    folder = hub.model_folder(NAME, token="hf_secret")
    assert "hf_secret" not in (folder / "manifest.json").read_text()


@pytest.mark.parametrize(("name", "revision"), [("some-org/Other", "main"), (NAME, "v9"), ("no such/na me", "main")])
def test_a_name_that_is_nowhere_is_told_plainly(server, name, revision, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder under .* could not be downloaded"):
        hub.model_folder(name, revision)
    assert not (tmp_path / "checkpoints").exists()


def test_the_hub_is_where_hf_endpoint_says(server, tmp_path):
    """The same in a process of its own, with nothing patched."""
    script = f"""
from pathlib import Path
from rsft_lib.checkpoint import hub
hub.CHECKPOINTS = Path({str(tmp_path / "elsewhere")!r})
print(hub.model_folder({NAME!r}))
"""
    environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    verify(tmp_path / "elsewhere" / FOLDER)


def test_without_a_network_a_missing_model_is_told_plainly_and_a_present_one_is_used(server, monkeypatch):
    folder = hub.model_folder(NAME)
    point_to("http://127.0.0.1:9", monkeypatch)
    assert hub.model_folder(NAME) == folder
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        hub.model_folder("some-org/Other")


def test_a_repository_without_weights_is_refused(server):
    for name in ("model.safetensors", "model-00001-of-00001.safetensors", "pytorch_model.bin"):
        del server.files[name]
    with pytest.raises(ValueError, match="no model.safetensors and no pytorch_model.bin"):
        hub.model_folder(NAME)


def test_a_model_that_cannot_be_trained_is_refused_with_nothing_but_its_config_fetched(server, tmp_path):
    config = server.files["config.json"]
    for change, message in (({"model_type": "gpt2"}, "model_type is 'gpt2'"), ({"mlp_bias": True}, "mlp_bias is True")):
        config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "llama", **change}))
        with pytest.raises(ValueError, match=f"'{NAME}' was not downloaded from the Hub: .*config.json: {message}"):
            hub.model_folder(NAME)
        assert server.fetched() == {"config.json"} and not list(tmp_path.glob("checkpoints/*"))
    del server.files["config.json"]
    with pytest.raises(ValueError, match="on the Hub has no config.json"):
        hub.model_folder(NAME)
    assert server.fetched() == {"config.json"}


def test_a_folder_that_somebody_else_made_is_not_touched(server, tmp_path):
    theirs = tmp_path / "checkpoints" / FOLDER
    theirs.mkdir(parents=True)
    (theirs / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="was not downloaded by this kit: name it instead"):
        hub.model_folder(NAME)
    assert os.listdir(theirs) == ["config.json"]
    shutil.rmtree(theirs)
    assert hub.model_folder(NAME) == theirs
