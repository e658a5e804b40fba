"""training/ship.py: what it writes loads as the models of the package do, and gives the codes and videos of the originals."""

import json
import shutil
from dataclasses import replace

from larp.hub import WEIGHTS
from larp.models.generator import GeneratorConfig, LarpGenerator
from larp.models.growing import with_refiner
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp_mllm import locate
from larp_mllm.pipeline import Mllm
from tests.larp_mllm.model.test_partial_lora import with_updates
from tests.larp_mllm.tiny import colourful_mllm
from training import ship as ship_script
from training.ship import main, without_paths

import pytest
import torch


@pytest.fixture
def trained(tmp_path):
    """A folder with a tokenizer that has a prior, and a generator and a language model of its codes."""
    mllm = colourful_mllm()
    small = mllm.processor.video_tokenizer
    tokenizer = LarpTokenizer(replace(small.config, prior=PriorConfig(depth=1, heads=1, width=8, positions=4)))
    tokenizer.load_state_dict(tokenizer.state_dict() | small.state_dict())
    mllm.processor.video_tokenizer = tokenizer.eval()
    mllm.model.config.video_tokenizer_hash = tokenizer.weight_hash()
    mllm.save(tmp_path / "mllm" / "model")
    data = {
        "tokens": {"data": "jsonl:/home/me/clips.jsonl+shapes:count=9"},
        "held_out_text": "a text",
        "records": {"trained_on": 2},
    }
    report = {"steps": 3, "data": data, "model": "/home/me/run/model", "samples": ["/home/me/run/sheet.png"]}
    (tmp_path / "mllm" / "model" / "training.json").write_text(json.dumps(report))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    shape = GeneratorConfig(num_tokens=4, codebook_size=16, depth=1, heads=1, width=8, num_classes=2, code_dim=4)
    LarpGenerator(replace(shape, tokenizer_hash=tokenizer.weight_hash())).save_pretrained(tmp_path / "generator")
    return tmp_path


def ship(folder, **others):
    models = {name: folder / name for name in ("tokenizer", "generator", "mllm")} | others
    main([*(word for name, path in models.items() for word in (f"--{name}", str(path))), "--out", str(folder / "out")])


def test_shipped_models_belong_together_and_have_the_codes_of_the_originals(trained, monkeypatch):
    ship(trained)
    out = trained / "out"
    monkeypatch.setattr(locate, "_SHIPPED", out)
    before, after = (
        LarpTokenizer.from_pretrained(trained / "tokenizer"),
        LarpTokenizer.from_pretrained(out / "tokenizer"),
    )
    clips = torch.rand(3, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert after.prior is None and torch.equal(before.encode(clips), after.encode(clips))
    generator = LarpGenerator.from_pretrained(out / "generator")
    generator.check_tokenizer(4, 16, after.weight_hash())
    assert sorted(path.name for path in (out / "language-model").iterdir() if path.is_dir()) == []
    model = Mllm.load(out / "language-model", "cpu")
    assert model.model.dtype == torch.float32 and model.processor.video_tokenizer.weight_hash() == after.weight_hash()
    assert model.generate(["a person surfing"])[0].frames.shape == (4, 16, 16, 3)
    kept = json.loads((out / "language-model/training.json").read_text())
    assert kept == {
        "steps": 3,
        "data": {
            "tokens": {"data": "jsonl:clips.jsonl+shapes:count=9"},
            "held_out_text": "a text",
            "records": {"trained_on": 2},
        },
    }
    halves = sum((out / part / WEIGHTS).stat().st_size for part in ("tokenizer", "generator", "language-model"))
    wholes = sum((trained / part / WEIGHTS).stat().st_size for part in ("tokenizer", "generator", "mllm/model"))
    assert halves < 0.8 * wholes
    assert json.loads((out / "language-model/config.json").read_text())["video_tokenizer_hash"] == after.weight_hash()


def test_smollm2_is_shipped_without_its_base(trained, monkeypatch):
    """A tiny base stands in for it."""
    mllm = colourful_mllm()
    mllm.model.base.save_pretrained(trained / "base")
    mllm.processor.tokenizer.save_pretrained(trained / "base")
    with_updates(mllm)
    mllm.processor.video_tokenizer = LarpTokenizer.from_pretrained(trained / "tokenizer")
    mllm.model.config.video_tokenizer_hash = mllm.processor.video_tokenizer.weight_hash()
    mllm.save(trained / "smollm2")
    monkeypatch.setattr(ship_script, "SMOLLM2", str(trained / "base"))
    ship(trained, smollm2=trained / "smollm2")
    out = trained / "out"
    assert not (out / "smollm2/video_tokenizer").exists()
    assert (out / "smollm2" / WEIGHTS).stat().st_size < (trained / "smollm2" / WEIGHTS).stat().st_size / 2
    monkeypatch.setattr(locate, "_SHIPPED", out)
    monkeypatch.setitem(locate.SHIPPED_MODELS, "smollm2", "smollm2")
    loaded = Mllm.load("smollm2", "cpu")
    assert loaded.generate(["a person surfing"])[0].frames.shape == (4, 16, 16, 3)
    shutil.rmtree(trained / "base")
    with pytest.raises(ValueError, match="base"):
        Mllm.load("smollm2", "cpu")


def test_a_tokenizer_that_was_refined_since_has_the_same_codes(trained, monkeypatch):
    refined = with_refiner(LarpTokenizer.from_pretrained(trained / "tokenizer"), 8)
    torch.nn.init.normal_(refined.refiner.last.weight, std=0.1)
    ship(trained)
    # As after a training of the refiner of what was shipped.
    again = with_refiner(LarpTokenizer.from_pretrained(trained / "out/tokenizer"), 8)
    again.refiner.load_state_dict(refined.refiner.state_dict())
    again.save_pretrained(trained / "refined")
    monkeypatch.setattr(locate, "_SHIPPED", trained / "out")
    models = {"generator": trained / "out/generator", "mllm": trained / "out/language-model"}
    main([*(str(word) for name, path in models.items() for word in (f"--{name}", path)), "--tokenizer",
          str(trained / "refined"), "--out", str(trained / "new")])  # fmt: skip
    monkeypatch.setattr(locate, "_SHIPPED", trained / "new")
    model = Mllm.load(trained / "new/language-model", "cpu")
    assert model.processor.video_tokenizer.refiner is not None
    assert model.generate(["a person surfing"])[0].frames.shape == (4, 16, 16, 3)


def test_no_folder_of_the_machine_is_left_in_a_report():
    report = {
        "recipe": "/home/me/my recipes/a.toml",
        "base": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "seconds": 2.5,
        "captions": {"examples": ["black and/or white"]},
        "data": {
            "held_out_text": "one line in 20 of txt:/home/me/my texts/a.txt, txt:/home/me/b.txt",
            "tokens": {"data": "jsonl:/home/me/clips.jsonl+ucf101:/data/ucf", "clips": 9, "hop": None},
            "records": {"trained_on": 19, "held_out": 1},
            "text_pieces": 3,
            "notes": [
                "1 of 2 held-out records show a video (/home/me/my records.jsonl:3, b/c.jsonl:4): figures say little",
                "wds:/home/me/{0..3}.tar: shards that are missing: 1 of 4 (/home/me/3.tar; /home/me/4.tar)",
            ],
        },
        "text": {"data": "txt:/home/me/b.txt", "before": {"nll": 2.0}},
        "resumed": [{"step": 2, "changed": {"tokens": ["/home/me/a", "/home/me/b"], "text": [[], ["txt:/home/me/c"]]}}],
    }  # fmt: skip
    assert without_paths({**report, "model": "/home/me/run/model"}) == {
        "recipe": "a.toml",
        "base": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "seconds": 2.5,
        "captions": {"examples": ["black and/or white"]},
        "data": {
            "held_out_text": "one line in 20 of txt:a.txt, txt:b.txt",
            "tokens": {"data": "jsonl:clips.jsonl+ucf101:ucf", "clips": 9, "hop": None},
            "records": {"trained_on": 19, "held_out": 1},
            "text_pieces": 3,
            "notes": [
                "1 of 2 held-out records show a video (my records.jsonl:3, c.jsonl:4): figures say little",
                "wds:{0..3}.tar: shards that are missing: 1 of 4 (3.tar; 4.tar)",
            ],
        },
        "text": {"data": "txt:b.txt", "before": {"nll": 2.0}},
        "resumed": [{"step": 2, "changed": {"tokens": ["a", "b"], "text": [[], ["txt:c"]]}}],
    }  # fmt: skip


def test_what_was_shipped_stays_where_a_model_cannot_be_written(tmp_path, monkeypatch):
    mllm = colourful_mllm()
    mllm.save(tmp_path / "model")
    monkeypatch.setattr(ship_script, "save_file", lambda *_, **__: 1 / 0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/kept").write_text("")
    with pytest.raises(ZeroDivisionError):
        ship_script.write_mllm(tmp_path / "model", tmp_path / "out", "0" * 64)
    assert [path.name for path in tmp_path.joinpath("out").iterdir()] == ["kept"]


def test_models_of_other_codes_are_refused(trained):
    other = LarpGenerator(
        GeneratorConfig(num_tokens=4, codebook_size=16, depth=1, heads=1, width=8, tokenizer_hash="aa11")
    )
    other.save_pretrained(trained / "other")
    with pytest.raises(ValueError, match="--generator was trained on codes of the tokenizer aa11"):
        ship(trained, generator=trained / "other")
