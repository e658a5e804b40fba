"""find_model and its relatives: folders, runs, the defaults, the hub, and errors for folders without a model."""

import json
import shutil
import time
from fnmatch import fnmatch
from pathlib import Path

from larp_mllm import locate
from larp_mllm.locate import (
    _snapshot,
    clear_default_model,
    find_generator,
    find_model,
    find_tokenizer,
    home,
    set_default_model,
    shipped,
)
from larp_mllm.pipeline import Mllm
from tests.larp_mllm.tiny import tiny_video_tokenizer

import pytest


@pytest.fixture
def run(qwen, tmp_path):
    """A run folder of training: its own config.json beside model/."""
    folder = tmp_path / "run"
    qwen.save(folder / "model")
    (folder / "config.json").write_text(json.dumps({"recipe": None, "base": "tiny-qwen2"}))
    return folder


@pytest.fixture
def pointer(monkeypatch, tmp_path):
    """The file that points to the default model, in a temporary home."""
    monkeypatch.setenv("LARP_MLLM_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return home() / "newest.json"


def test_the_model_of_a_run_folder_is_found(qwen, run, monkeypatch):
    assert find_model(run) == find_model(run / "model") == run / "model"
    assert Mllm.load(run, "cpu").generate(["surfing"])[0].codes == qwen.generate(["surfing"])[0].codes
    monkeypatch.setenv("LARP_MLLM_MODEL", str(run))
    assert find_model() == run / "model"


def test_models_of_another_kind_are_named(tmp_path):
    tiny_video_tokenizer().save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds a larp-tokenizer; needed is .* model_type larp_mllm"):
        Mllm.load(tmp_path / "run" / "model")
    with pytest.raises(ValueError, match="holds a run that trained a larp-tokenizer"):
        Mllm.load(tmp_path / "run")


def test_errors_say_what_a_folder_without_a_model_holds(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        find_model(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        find_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json has no model_type"):
        find_model(tmp_path)
    (tmp_path / "state").mkdir()
    with pytest.raises(ValueError, match=r"has not written model yet \(continue it with --resume\)"):
        find_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_ty')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON.*copy the model folder again"):
        find_model(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "3", "null", "{}", '{"model": 3}', ""])
def test_a_damaged_pointer_is_named_with_the_remedy(pointer, content):
    pointer.write_text(content)
    with pytest.raises(ValueError, match=r"newest\.json is damaged .*: delete it"):
        find_model()


def test_a_default_model_is_cleared_by_each_of_several_processes(pointer, tmp_path, monkeypatch):
    assert set_default_model(tmp_path) == pointer
    monkeypatch.setattr(locate, "_newest", lambda _: tmp_path)  # looked up before another process cleared it
    for _ in range(2):
        clear_default_model(tmp_path)
        assert not pointer.exists()


def test_the_newest_generator_is_the_default_until_it_is_deleted(qwen, tmp_path, capsys):
    assert find_generator() == str(shipped("generator")) and find_generator("owner/name") == "owner/name"
    qwen.save(tmp_path / "mllm")
    set_default_model(tmp_path / "mllm")
    (tmp_path / "run/model").mkdir(parents=True)
    pointer = set_default_model(tmp_path / "run/model", "generator")
    assert find_generator() == str(tmp_path / "run/model") and find_model() == tmp_path / "mllm"
    assert f"the newest one that was trained here: {tmp_path / 'run/model'}\n" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run")
    assert find_generator() == str(shipped("generator"))
    pointer.write_text("{")
    with pytest.raises(ValueError, match=r"newest-generator\.json is damaged .*: delete it"):
        find_generator()


def test_a_class_that_only_the_generator_of_the_package_knows_is_its(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"class_names": ["red square", "blue circle"]}')
    set_default_model(tmp_path, "generator")
    for classes in ([], ["RedSquare"], ["nonsense"], ["0"], ["red square", "surfing"]):
        assert find_generator(None, classes) == str(tmp_path)
    capsys.readouterr()
    for _ in range(2):
        assert find_generator(None, ["surfing", "horse race"]) == str(shipped("generator"))
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and f"the newest generator that was trained here, {tmp_path}, knows no class surfing, so" in said
    )


def test_the_models_of_the_package_share_their_tokenizer(qwen, tmp_path, monkeypatch):
    assert find_tokenizer() == find_tokenizer(str(find_model("tiny"))) == str(shipped("tokenizer"))
    qwen.save(tmp_path / "mllm")
    set_default_model(tmp_path / "mllm")
    assert find_tokenizer() == str(tmp_path / "mllm/video_tokenizer")
    monkeypatch.setenv("LARP_MLLM_MODEL", "tiny")
    assert find_tokenizer() == str(shipped("tokenizer"))


def test_damaged_files_are_named(run):
    model = run / "model"
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .*truncated: copy"):
        Mllm.load(run)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .*copy"):
        Mllm.load(run)
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged: copy"):
        Mllm.load(run)
    (model / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing: copy"):
        Mllm.load(run)


def test_a_missing_video_tokenizer_is_not_looked_up_on_the_hub(run, monkeypatch):
    shutil.rmtree(run / "model" / "video_tokenizer")
    monkeypatch.chdir(run)
    with pytest.raises(ValueError, match="video_tokenizer: no such folder"):
        Mllm.load("model")


@pytest.fixture
def hub(run, monkeypatch):
    """A hub with the one repository owner/name; returns the list of its calls."""
    calls = []

    def snapshot_download(name, **options):
        calls.append((name, options))
        if name != "owner/name":
            raise OSError(f"404 Client Error: Repository Not Found for {name}")
        if options.get("local_files_only"):
            raise OSError("not in the local cache")
        return str(run / "model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("larp.hub_files.check_reachable", lambda name, token: None)
    _snapshot.cache_clear()
    yield calls
    _snapshot.cache_clear()


def test_a_hub_name_is_fetched_once_without_pickle_or_code(qwen, run, hub, monkeypatch):
    monkeypatch.setenv("LARP_MLLM_MODEL", "owner/name")
    assert find_model("owner/name") == find_model() == run / "model"
    assert Mllm.load("owner/name", "cpu").generate(["surfing"])[0].codes == qwen.generate(["surfing"])[0].codes
    assert len(hub) == 1
    patterns = hub[0][1]["allow_patterns"]
    for name in ("config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "chat_template.jinja"):
        assert any(fnmatch(name, pattern) for pattern in patterns)
    assert any(fnmatch("video_tokenizer/model.safetensors", pattern) for pattern in patterns)
    for name in ("pytorch_model.bin", "modeling_other.py", "training_args.pt"):
        assert not any(fnmatch(name, pattern) for pattern in patterns)


def test_an_unknown_hub_name_is_refused_with_the_remedy(hub):
    with pytest.raises(
        ValueError, match=r"model=owner/nam is no folder here, and could not be fetched .*404.*LARP_MLLM_MODEL"
    ):
        find_model("owner/nam")


def test_without_a_network_the_error_comes_within_seconds(monkeypatch):
    _snapshot.cache_clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"owner/other is no folder here.*HF_HUB_OFFLINE is set"):
        find_model("owner/other")
    assert time.monotonic() - started < 10


def test_a_mistyped_folder_is_not_looked_up_on_the_hub(hub, run, monkeypatch):
    monkeypatch.chdir(run.parent)
    for folder in ("run/modle", "./owner/name", Path("owner/name")):
        with pytest.raises(ValueError, match="there is no such folder"):
            find_model(folder)
    assert hub == []
