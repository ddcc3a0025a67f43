"""Models from the Hub, with the Hub's own client and a server that imitates the Hub."""

import json
import os
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
from hub_server import CLUTTER, COMMIT, FOLDER, NAME, TAG, Hub
from support import tiny_model, tiny_tokenizer

from rsft_lib.checkpoint import hub
from rsft_lib.checkpoint.convert import convert
from rsft_lib.common.artifact import read_manifest, verify


def point_to(endpoint, monkeypatch):
    """Same as setting HF_ENDPOINT before the library is imported."""
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


def test_an_existing_download_is_used_without_contacting_the_hub(server):
    folder = hub.model_folder(NAME)
    server.requests.clear()
    assert hub.model_folder(NAME) == hub.model_folder(NAME, COMMIT) == hub.model_folder(str(folder)) == folder
    assert server.requests == []


def test_another_revision_or_an_incomplete_folder_is_downloaded(server):
    folder = hub.model_folder(NAME)
    hub.model_folder(NAME, "v1")
    assert read_manifest(folder)["commit"] == TAG
    (folder / "model.safetensors").unlink()
    server.requests.clear()
    hub.model_folder(NAME, "v1")
    assert server.requests and verify(folder)


def test_bin_files_are_downloaded_only_without_safetensors(server):
    del server.files["model.safetensors"], server.files["model-00001-of-00001.safetensors"]
    folder = hub.model_folder(NAME)
    assert (folder / "pytorch_model.bin").read_bytes() == b"pickled"


def test_an_interrupted_connection_is_resumed(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    server.break_off = "model.safetensors"
    verify(hub.model_folder(NAME))
    assert [path for method, path in server.requests if method == "RANGE"] == ["model.safetensors"]


def test_a_killed_download_resumes_with_the_missing_files(server, tmp_path, monkeypatch):
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


def test_a_file_damaged_in_the_download_is_refused_and_downloaded_again(server, tmp_path):
    server.damage = "model.safetensors"
    with pytest.raises(ValueError, match="model.safetensors was damaged in the download"):
        hub.model_folder(NAME)
    assert not (tmp_path / "checkpoints" / FOLDER).exists()
    server.damage = None
    verify(hub.model_folder(NAME))


def test_a_model_that_asks_for_a_token_gets_it(server, monkeypatch):
    server.token = "hf_secret"
    with pytest.raises(FileNotFoundError, match="set HF_TOKEN"):
        hub.model_folder(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    folder = hub.model_folder(NAME)
    assert "hf_secret" not in (folder / "manifest.json").read_text()


@pytest.mark.parametrize(("name", "revision"), [("some-org/Other", "main"), (NAME, "v9"), ("no such/na me", "main")])
def test_an_unknown_name_is_reported(server, name, revision, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder in .* could not be downloaded"):
        hub.model_folder(name, revision)
    assert not (tmp_path / "checkpoints").exists()


def test_hf_endpoint_is_respected(server, tmp_path):
    """In a separate process, without patches."""
    script = f"""
from pathlib import Path
from rsft_lib.checkpoint import hub
hub.CHECKPOINTS = Path({str(tmp_path / "elsewhere")!r})
print(hub.model_folder({NAME!r}))
"""
    environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    verify(tmp_path / "elsewhere" / FOLDER)


def test_without_a_network_a_missing_model_is_reported_and_an_existing_one_is_used(server, monkeypatch):
    folder = hub.model_folder(NAME)
    point_to("http://127.0.0.1:9", monkeypatch)
    assert hub.model_folder(NAME) == folder
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        hub.model_folder("some-org/Other")


def test_a_repository_without_weights_is_refused(server):
    for name in ("model.safetensors", "model-00001-of-00001.safetensors", "pytorch_model.bin"):
        del server.files[name]
    with pytest.raises(ValueError, match="neither model.safetensors nor pytorch_model.bin"):
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
    with pytest.raises(FileExistsError, match="was not downloaded by this kit: pass it instead"):
        hub.model_folder(NAME)
    assert os.listdir(theirs) == ["config.json"]
    shutil.rmtree(theirs)
    assert hub.model_folder(NAME) == theirs
