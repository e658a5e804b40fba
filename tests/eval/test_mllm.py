"""eval/mllm.py on a model that knows nothing: the record is whole, whatever the score."""

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
    assert record == json.loads((tmp_path / "eval-mllm.json").read_text())
    assert (tmp_path / "eval-mllm.png").is_file()
    printed = capsys.readouterr().out
    assert "colour" in printed and "seed 3" in printed


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="no model folder"):
        evaluation.main(["--model", str(tmp_path)])
