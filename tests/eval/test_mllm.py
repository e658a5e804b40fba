"""eval/mllm.py on a model that knows nothing: the record is whole, whatever the score."""

import hashlib
import json

from eval import mllm as evaluation
from tests.larp_mllm.tiny import tiny_mllm

import pytest


def test_the_score_comes_with_its_protocol(tmp_path, capsys):
    tiny_mllm().save(tmp_path / "model")
    record = evaluation.main(
        ["--model", str(tmp_path / "model"), "--num-prompts", "8", "--seed", "3", "--guidance-scale", "2"]
    )
    assert record["n"] == len(record["videos"]) == 8
    assert record["videos"][0]["prompt"] == "a red circle moving left"
    assert (record["protocol"]["seed"], record["protocol"]["guidance_scale"]) == (3, 2.0)
    assert record["reconstructed"]["n"] == 8 and 0 <= record["reconstructed"]["shape_accuracy"] <= 1
    assert record == json.loads((tmp_path / "eval-mllm.json").read_text())
    assert (tmp_path / "eval-mllm.png").is_file()
    protocol = record["protocol"]
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert protocol["checkpoint"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert set(protocol["checkpoint"]) == {"model.safetensors", "video_tokenizer/model.safetensors"}
    assert set(protocol["versions"]) == {"larp", "torch", "python", "transformers", "numpy", "av"}
    printed = capsys.readouterr().out
    assert "colour" in printed and "seed 3" in printed


def test_a_model_outside_of_a_run_gets_no_files_beside_it(tmp_path, monkeypatch):
    tiny_mllm().save(tmp_path / "package" / "language-model")
    monkeypatch.chdir(tmp_path)
    evaluation.main(["--model", "package/language-model", "--num-prompts", "2"])
    assert (tmp_path / "eval-mllm.json").is_file() and len(list((tmp_path / "package").iterdir())) == 1


@pytest.mark.parametrize(
    "out, words",
    [
        ("folder", "folder is a folder"),
        ("sheet", r"sheet\.png is a folder"),
        ("file/x.json", "file is a file, not a folder"),
        ("/proc/x.json", "/proc takes no files"),
    ],
)
def test_a_bad_out_is_refused_before_anything_is_generated(tmp_path, monkeypatch, out, words):
    monkeypatch.setattr(evaluation.Mllm, "load", lambda *_: pytest.fail("the model was loaded"))
    tiny_mllm().save(tmp_path / "model")
    for name in ("folder", "sheet.png"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=words):
        evaluation.main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / out)])


@pytest.mark.parametrize("option", [("--out", "x.png"), ("--guidance-scale", "inf"), ("--top-p", "nan")])
def test_bad_options_end_with_a_message(capsys, option):
    with pytest.raises(SystemExit):
        evaluation.main(option)
    assert option[0].removeprefix("--").split("-")[0] in capsys.readouterr().err


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="no model folder"):
        evaluation.main(["--model", str(tmp_path)])
