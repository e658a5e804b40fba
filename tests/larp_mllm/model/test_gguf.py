"""Bases in GGUF files: a tiny one written here, and the real one where it was fetched."""

import json
import shutil

from larp_mllm.model.base_models import BaseError, load_base
from larp_mllm.model.gguf import SOURCE, dequantize, find_gguf

import pytest
import torch

gguf = pytest.importorskip("gguf")


def test_damaged_files_and_folders_of_several_are_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(BaseError, match=r"--base .*x.gguf: .*x.gguf cannot be read as GGUF"):
        load_base(str(tmp_path / "x.gguf"))
    assert find_gguf(str(tmp_path)) == tmp_path / "x.gguf"
    (tmp_path / "y.gguf").write_bytes(b"")
    assert find_gguf(str(tmp_path)) is None and find_gguf(str(tmp_path / "absent")) is None
    assert not [path for path in tmp_path.rglob("*.part")]


def test_other_families_are_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "gpt.gguf", "gpt2")
    for add, value in ((writer.add_context_length, 8), (writer.add_embedding_length, 8), (writer.add_block_count, 1),
                       (writer.add_feed_forward_length, 8), (writer.add_head_count, 1)):  # fmt: skip
        add(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BaseError, match=r"gpt\.gguf cannot be read as GGUF: it holds a gpt2, needed is one of llama"):
        load_base(str(tmp_path / "gpt.gguf"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LARP_CACHE", str(tmp_path / "file"))
    with pytest.raises(BaseError, match=r"the cache folder .*file cannot be written .*LARP_CACHE"):
        load_base(str(tmp_path / "x.gguf"))


@pytest.mark.slow
def test_a_damaged_file_leaves_no_base_behind(fetched, tmp_path, monkeypatch):
    """Cut short, and with one tensor said to be of another quantization."""
    content = fetched("smollm2").read_bytes()
    monkeypatch.setenv("LARP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cut.gguf").write_bytes(content[: len(content) // 2])
    (tmp_path / "other.gguf").write_bytes(content)
    reader = gguf.GGUFReader(tmp_path / "other.gguf", "r+")
    tensor = next(tensor for tensor in reader.tensors if tensor.tensor_type.name == "Q4_1")
    tensor.field.parts[-2][0] = 34
    reader.data.flush()
    for name in ("cut", "other"):
        with pytest.raises(
            BaseError, match=rf"{name}.gguf cannot be read as GGUF: .*[^.]\. Download it again"
        ) as raised:
            load_base(str(tmp_path / f"{name}.gguf"))
        assert "\n" not in str(raised.value)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.slow
def test_the_fetched_base_answers_and_is_dequantized_once(fetched, tmp_path, monkeypatch):
    path = fetched("smollm2")
    monkeypatch.setenv("LARP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    shutil.copy(path, tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, tokenizer = load_base("SmolLM2-135M-Instruct")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=1, do_sample=False)[0, -1]
    assert tokenizer.decode(answer).strip() == "Paris"
    folder = dequantize(tmp_path / "cache" / path.name)
    assert json.loads((folder / SOURCE).read_text())["file"] == path.name
    assert model.config.dequantized_from.startswith(f"{path.name}, SHA-256 ")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    again, _ = load_base(str(tmp_path / "cache" / path.name))
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
