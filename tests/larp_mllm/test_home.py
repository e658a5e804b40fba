"""Which folder is a model, and what is said of one that is not, or is damaged."""

import json
import shutil

from larp_mllm.generation import Mllm
from larp_mllm.home import find_model, home
from tests.larp_mllm.tiny import tiny_video_tokenizer

import pytest


@pytest.fixture
def run(qwen, tmp_path):
    """A run folder as training leaves it: its own config.json beside model/."""
    folder = tmp_path / "run"
    qwen.save(folder / "model")
    (folder / "config.json").write_text(json.dumps({"recipe": None, "base": "tiny-qwen2"}))
    return folder


@pytest.fixture
def pointer(monkeypatch, tmp_path):
    """The path of a pointer in a home of its own."""
    monkeypatch.setenv("LARP_MLLM_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return home() / "newest.json"


def test_a_run_folder_stands_for_its_model(qwen, run, monkeypatch):
    assert find_model(run) == find_model(run / "model") == run / "model"
    assert Mllm.load(run, "cpu").generate(["surfing"])[0].codes == qwen.generate(["surfing"])[0].codes
    monkeypatch.setenv("LARP_MLLM_MODEL", str(run))
    assert find_model() == run / "model"


def test_models_of_another_kind_are_named(tmp_path):
    tiny_video_tokenizer().save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds a larp-tokenizer.*Needed is .* model_type larp_mllm"):
        Mllm.load(tmp_path / "run" / "model")
    with pytest.raises(ValueError, match="holds a run that trained a larp-tokenizer"):
        Mllm.load(tmp_path / "run")


def test_folders_without_a_model_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        find_model(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        find_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json has no model_type"):
        find_model(tmp_path)
    (tmp_path / "state").mkdir()
    with pytest.raises(ValueError, match=r"has not written model yet \(go on with it with --resume\)"):
        find_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_ty')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON.*copy the model folder again"):
        find_model(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "3", "null", "{}", '{"model": 3}', ""])
def test_a_damaged_pointer_is_named_with_the_remedy(pointer, content):
    pointer.write_text(content)
    with pytest.raises(ValueError, match=r"newest\.json is damaged .*: delete it"):
        find_model()


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


def test_a_missing_video_tokenizer_is_not_sought_on_the_hub(run, monkeypatch):
    shutil.rmtree(run / "model" / "video_tokenizer")
    monkeypatch.chdir(run)
    with pytest.raises(ValueError, match="video_tokenizer: no such folder"):
        Mllm.load("model")
