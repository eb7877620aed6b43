"""Hub ids against a small server on this machine and hand-made caches; every call runs in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaspec.io.hub import parse_id
from tests.io.files import write_checkpoint, write_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOWHERE = "http://127.0.0.1:9"  # nobody listens on the discard port
SCRIPT = """
import json, sys, time
from deltaspec.errors import CheckpointError
from deltaspec.io.open import open_plain
if sys.argv[1] == "no-names":
    import socket
    socket.getaddrinfo = lambda *found, **named: time.sleep(60)
for ref in sys.argv[2:]:
    begin = time.monotonic()
    try:
        source = open_plain(ref)
        said = {"tensors": sorted(getattr(source, "tensors", None) or source.modules), "revision": source.revision}
        said |= {"config": source.config, "files": sorted(file.name for file in source.files)}
    except CheckpointError as error:
        said = {"error": str(error)}
    print(json.dumps({**said, "seconds": time.monotonic() - begin}))
sys.stdout.flush()
"""


def opened(*refs: str, home: Path, endpoint: str, names: str = "names", **environment: str) -> list[dict[str, Any]]:
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()
    }
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, names, *refs],
        env={**clean, "HF_HUB_DISABLE_XET": "1", **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


class Hub(ThreadingHTTPServer):
    """Serves folders as models, with the headers that huggingface_hub looks for; remembers what was asked."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.root = root
        self.asked: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            owner, name, revision = parts[2], parts[3], parts[5] if len(parts) > 5 else "main"
        else:
            owner, name, revision = parts[0], parts[1], parts[3]
        folder = self.server.root / owner / name
        if name == "gated":
            return self.refuse(403, "GatedRepo")
        if not folder.is_dir():
            return self.refuse(404, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if parts[0] == "api":
            siblings = [
                {"rfilename": str(file.relative_to(folder))} for file in sorted(folder.rglob("*")) if file.is_file()
            ]
            body = json.dumps({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}).encode()
        else:
            file = folder.joinpath(*parts[4:])
            if not file.is_file():
                return self.refuse(404, "EntryNotFound")
            body = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        return None


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    server = Hub(tmp_path / "remote")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_only_what_is_needed_is_fetched_and_then_nothing(hub: Hub, tmp_path: Path) -> None:
    model = write_checkpoint(hub.root / "owner" / "name", {"a": torch.eye(2), "b": torch.ones(3)}, "sharded")
    write_config(model, model_type="llama")
    write_checkpoint(model, {"other": torch.eye(9)}, "pickled")
    (model / "README.md").write_text("text")
    adapter = hub.root / "owner" / "adapter"
    write_checkpoint(adapter, {f"base_model.model.q.lora_{side}.weight": torch.eye(2) for side in "AB"})
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    refs = ("owner/name", f"owner/name@{COMMIT}", "owner/adapter@main")
    said = opened(*refs, home=tmp_path / "home", endpoint=hub.endpoint)
    assert [line.get("error") for line in said] == [None] * 3
    assert [line["revision"] for line in said] == [COMMIT] * 3
    assert said[0]["tensors"] == said[1]["tensors"] == ["a", "b"]
    assert said[0]["config"] == {"model_type": "llama"}
    assert said[2]["tensors"] == ["q"]
    wanted = {"config.json", "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors"}
    wanted |= {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path} == wanted
    hub.asked.clear()
    again = opened(*refs, home=tmp_path / "home", endpoint=hub.endpoint)
    assert hub.asked == []
    assert [line["tensors"] for line in again] == [line["tensors"] for line in said]


def test_what_the_hub_refuses_is_said_in_words(hub: Hub, tmp_path: Path) -> None:
    write_checkpoint(hub.root / "owner" / "name", {"a": torch.eye(2)})
    (hub.root / "owner" / "empty").mkdir()
    (hub.root / "owner" / "empty" / "README.md").write_text("text")
    refs = {
        "owner/none": "does not exist or is private",
        "owner/name@nope": "no such revision",
        "owner/gated": "gated",
        "owner/empty": "no weights.*README.md",
    }
    said = opened(*refs, home=tmp_path / "home", endpoint=hub.endpoint)
    for line, (ref, words) in zip(said, refs.items(), strict=True):
        assert ref.split("@")[0] in line["error"]
        assert "no such folder here" in line["error"]
        assert re.search(words, line["error"])


def hand_made_cache(home: Path, name: str, *, layout: str = "single", config: bool = True) -> Path:
    """A snapshot as the library lays it out: links into ../../blobs."""
    repo = home / "hub" / f"models--owner--{name}"
    for folder in ("refs", "blobs"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    snapshot = write_checkpoint(repo / "snapshots" / COMMIT, {"a": torch.eye(2), "b": torch.ones(3)}, layout)
    if config:
        write_config(snapshot, model_type="llama")
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(repo / "blobs" / str(number))
        file.symlink_to(Path("..", "..", "blobs", str(number)))
    return snapshot


def test_a_cached_model_needs_no_network_and_a_missing_one_fails_at_once_offline(tmp_path: Path) -> None:
    hand_made_cache(tmp_path / "home", "name", layout="sharded")
    refs = ("owner/name", f"owner/name@{COMMIT}", "owner/name@v2", "owner/other")
    said = opened(*refs, home=tmp_path / "home", endpoint=NOWHERE, HF_HUB_OFFLINE="1")
    assert [line.get("tensors") for line in said] == [["a", "b"], ["a", "b"], None, None]
    assert said[0]["revision"] == COMMIT
    for line in said[2:]:
        assert "HF_HUB_OFFLINE is set" in line["error"]
        assert line["seconds"] < 2


def test_what_is_cached_in_part_is_used_only_where_no_weights_are_missing(tmp_path: Path) -> None:
    hand_made_cache(tmp_path / "home", "no-config", config=False)
    snapshot = hand_made_cache(tmp_path / "home", "no-shard", layout="sharded")
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    snapshot = hand_made_cache(tmp_path / "home", "no-index", layout="sharded")
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    (snapshot / "model.safetensors.index.json").unlink()
    refs = ("owner/no-config", "owner/no-shard", "owner/no-index")
    said = opened(*refs, home=tmp_path / "home", endpoint=NOWHERE)
    assert said[0]["tensors"] == ["a", "b"]
    for line in said[1:]:
        assert "cannot be reached" in line["error"]


def test_a_name_lookup_that_hangs_is_given_up(tmp_path: Path) -> None:
    (line,) = opened("owner/name", home=tmp_path / "home", endpoint="http://hub.invalid", names="no-names")
    assert "no answer within 5 s" in line["error"]
    assert line["seconds"] < 8


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("owner/name", ("owner/name", "main")),
        ("owner/name@v1.0", ("owner/name", "v1.0")),
        ("owner/name@refs/pr/3", ("owner/name", "refs/pr/3")),
        ("gpt2@main", ("gpt2", "main")),
        ("gpt2", None),
        ("./owner/name", None),
        ("./name", None),
        ("../name", None),
        ("/name", None),
        ("~/name", None),
        ("a/b/c", None),
        ("folder/model.safetensors", None),
        ("folder/model.gguf", None),
        ("owner/..@main", None),
        ("owner/name@../../x", None),
        ("owner/name@", None),
        ("", None),
    ],
)
def test_what_is_a_hub_id(ref: str, expected: tuple[str, str] | None) -> None:
    assert parse_id(ref, suffixes=(".safetensors", ".gguf")) == expected
