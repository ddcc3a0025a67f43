"""Datasets by name, from a local fake Hub."""

import json
import os
import subprocess
import sys

import pytest
from hub_server import NAME, Answer, Hub

ROWS = [{"instruction": f"{i} + {i} ?", "output": f"<think>\nhm\n</think>\n\n{2 * i}"} for i in range(3)]
READ = """
import sys
from rsft_lib.data.records import source_of
for row in source_of(sys.argv[1]).rows():
    print(row.number, row.content["instruction"])
"""


class DataAnswer(Answer):
    def answer(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "datasets"]:
            return self.send_metadata("/".join(parts[2:4]), parts[4:])
        if parts[0] == "datasets" and parts[3] == "resolve" and "/".join(parts[5:]) in self.server.files:
            self.server.requests.append((self.command, parts[4]))
            return self.send_file("/".join(parts[5:]))
        return self.send(404, headers={"X-Error-Code": "EntryNotFound"})


@pytest.fixture
def server(tmp_path):
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    server = Hub(tmp_path / "repository")
    server.RequestHandlerClass = DataAnswer
    yield server
    server.shutdown()
    server.server_close()


def read(data: str, server, folder) -> subprocess.CompletedProcess:
    """In a process of its own, since the libraries read HF_ENDPOINT when they are imported."""
    environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-c", READ, data]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def test_a_dataset_is_read_by_name_at_its_revision(server, tmp_path):
    done = read(f"{NAME}:train@v1", server, tmp_path)
    assert done.stdout.splitlines() == [f"{i + 1} {row['instruction']}" for i, row in enumerate(ROWS)], done.stderr
    assert {revision for method, revision in server.requests if method == "GET"} == {"b" * 40}  # the tag's commit


def test_a_revision_that_does_not_exist_is_reported(server, tmp_path):
    done = read(f"{NAME}@none", server, tmp_path)
    assert done.returncode and "no dataset with split 'train' at revision 'none' could be loaded" in done.stderr
