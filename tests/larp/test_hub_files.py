"""Hub repositories: from the cache at once, else an answer within seconds."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import URLError

from larp import hub_files
from larp.hub import CheckpointError, resolve
from larp_mllm.locate import _snapshot, find_model
from larp_mllm.model.base_models import load_base

import pytest
from huggingface_hub import constants


@pytest.fixture
def silent(monkeypatch):
    """A hub that takes connections and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.hf_hub_url", lambda name, file, repo_type: f"{address}/{name}/{file}")
        monkeypatch.setattr(hub_files, "_TIMEOUT", 0.3)
        yield address


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A cache with the files of owner/name; returns its folder."""
    folder = tmp_path / "models--owner--name/snapshots/abc"
    names = ("config.json", "model.safetensors", "processor_config.json", "tokenizer_config.json")
    for name in (*names, "video_tokenizer/model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"model_type": "larp_mllm"}')
    (tmp_path / "models--owner--name/refs").mkdir()
    (tmp_path / "models--owner--name/refs/main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    _snapshot.cache_clear()
    yield folder
    _snapshot.cache_clear()


def test_a_hub_that_does_not_answer_is_one_line(silent):
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=r"no answer from 127\.0\.0\.1"):
        resolve("owner/name")
    with pytest.raises(ValueError, match=r"no answer from 127\.0\.0\.1"):
        find_model("owner/other")
    assert time.monotonic() - began < 5


def test_a_look_is_one_request_with_the_token_that_was_given(monkeypatch):
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append((self.path, self.headers.get("authorization")))
            self.send_response(200)
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: "mine")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
        monkeypatch.setattr("huggingface_hub.utils._detect_agent._registry", None)
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", "/nonexistent/registry.json")
        for token in (None, True, "other", False):
            hub_files.check_reachable("owner/name", token)
        server.shutdown()
    assert {path for path, _ in asked} == {"/owner/name/resolve/main/config.json"}
    assert [sent for _, sent in asked] == ["Bearer mine", "Bearer mine", "Bearer other", None]


def test_what_is_cached_needs_no_hub(silent, cached):
    assert resolve("owner/name") == find_model("owner/name") == cached
    (cached / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no answer"):
        resolve("owner/name")


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_both_variables_keep_away_from_the_network(variable, monkeypatch, cached):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("the network was asked"))
    for find in (resolve, find_model):
        assert find("owner/name") == cached
        with pytest.raises(ValueError, match=f"{variable} is set"):
            find("owner/other")


def test_an_answer_that_does_not_come_is_not_waited_for():
    with pytest.raises(TimeoutError, match="no answer from the hub within"):
        hub_files.within(lambda: time.sleep(5), 0.1)

    def refused():
        raise URLError(TimeoutError("timed out"))

    with pytest.raises(TimeoutError, match="no answer from there within 1 seconds"):
        hub_files.within(refused, 1, "there")


def test_a_base_that_is_not_cached_is_asked_for_once(silent, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", silent)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr("huggingface_hub.utils._detect_agent._registry", None)
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", "/nonexistent/registry.json")
    monkeypatch.setattr(hub_files, "_TIMEOUT", 0.3)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"no answer from 127\.0\.0\.1"):
        load_base("owner/base")
    assert time.monotonic() - began < 2.5  # its client waits 3 seconds to learn the name of the program
