"""eval/bench/token_scale.py on a small cache: the record holds every figure, and nothing is left on the disk."""

import json

from bench import token_scale
from larp.data import token_cache


def test_the_record_of_a_small_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(token_scale, "in_fresh_process", lambda work, *arguments: work(*arguments))
    monkeypatch.setattr(token_cache, "MAPPED_FROM", 1)
    options = ["--rows", "600", "--seconds", "0", "--folder", str(tmp_path / "made"), "--out", str(tmp_path / "r.json")]
    report = token_scale.main(options)
    assert json.loads((tmp_path / "r.json").read_text()) == report and not list((tmp_path / "made").iterdir())
    found = report["sizes"]["600"]
    assert found["shards"] == 67 and found["bytes"] > 600 * 64 * 2
    for name in ("generator", "again"):
        assert found[name]["samples"] == 20 * token_scale.BATCH and found[name]["samples_per_second"] > 0
        assert found[name]["open_seconds"] < 5 and set(found[name]["trained_mib"]) == {"own", "mapped"}
    assert found["language_model"]["sequences_per_second"] > 0 and found["language_model"]["start_seconds"] > 0
