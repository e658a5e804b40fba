"""An export is a stock checkpoint: plain transformers computes the same logits, and its tokens have our ids."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from larp_mllm.cli import main
from larp_mllm.export.checkpoint import export, read_video_ids, stock_model
from larp_mllm.generation.logits_processors import SpanRules
from larp_mllm.generation.sampling import VideoSampling
from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.pipeline import Mllm
from larp_mllm.processing.processor import LarpMllmProcessor
from tests.larp_mllm import tokenizers
from tests.larp_mllm.families import FAMILIES, OTHERS
from tests.larp_mllm.tiny import every_logit, tiny_video_tokenizer

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, LoraModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TEXTS = {
    "qwen2": "qwen2_chat",
    "qwen3": "qwen3",
    "llama2": "llama2",
    "llama3": "llama3",
    "mistral": "mistral",
    "smollm": "smollm",
    "qwen3.5": "qwen3",
}
QUICK = {"qwen2-tied", "qwen3-untied", "llama2", "llama3-tied", "mistral"}
PROMPT = "a person surfing <|video_start|>"
GREEDY = VideoSampling(guidance_scale=1.0, temperature=0.0)


def make(folder, family="qwen2-tied", text=None, rows=520) -> Mllm:
    """A random model of a family with a text tokenizer of its kind, and random adapter rows."""
    torch.manual_seed(0)
    tokenizer = tokenizers.BUILDERS[text or TEXTS[family.split("-")[0]]](folder / "text")
    config = (FAMILIES | OTHERS)[family]()
    config.vocab_size = rows
    clips = tiny_video_tokenizer()
    model = LarpMllmForCausalLM.from_base(
        AutoModelForCausalLM.from_config(config), len(tokenizer), clips.codebook, clips.num_tokens, fps=5.0
    ).eval()
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return Mllm(model, LarpMllmProcessor(tokenizer, clips, model.vocabulary))


def mixed_ids(mllm, rows=2, length=12):
    known = mllm.model.base.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, mllm.model.vocabulary.size, (rows, length), generator=torch.Generator().manual_seed(1))
    return torch.where((ids >= known) & (ids < mllm.model.vocabulary.text_size), 0, ids)


def sample(model, layout, prompt, **options):
    """Sample codes under the constraint of the README."""
    codes, count = (
        range(layout["first_code"], layout["first_code"] + layout["codebook_size"]),
        layout["tokens_per_video"],
    )
    options = {"do_sample": False, "prefix_allowed_tokens_fn": lambda row, ids: list(codes), **options}
    ids = torch.tensor([prompt])
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), min_new_tokens=count, max_new_tokens=count, **options
    )[0, len(prompt) :].tolist()


@torch.no_grad()
@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_plain_transformers_computes_the_same(family, tmp_path):
    mllm = make(tmp_path, family)
    folder = export(mllm, tmp_path / "out")
    stock, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert type(stock).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    assert type(stock) is type(mllm.model.base) and stock.config.architectures == [type(stock).__name__]
    assert stock.config.vocab_size == mllm.model.vocabulary.size and not stock.config.tie_word_embeddings
    ids = mixed_ids(mllm)
    torch.testing.assert_close(stock(ids).logits, every_logit(mllm.model, ids), atol=1e-5, rtol=0)

    layout = json.loads((folder / "larp.json").read_text())
    prompt = mllm.processor.layout.prompt(mllm.processor.encode_text(PROMPT))
    ids = sample(stock, layout, prompt)
    (video,) = mllm.generate([PROMPT], sampling=GREEDY)
    assert tuple(i - layout["first_code"] for i in ids) == video.codes
    again = read_video_ids(folder, [layout["video_start"], *ids, layout["video_end"]])
    assert np.array_equal(again.frames, video.frames) and again.fps == video.fps == 5.0 and again.codes == video.codes


@pytest.mark.parametrize("text", tokenizers.BUILDERS)
def test_the_tokens_of_video_ids_have_exactly_their_ids(text, tmp_path):
    mllm = make(tmp_path, "llama3-untied" if "llama" in text else "qwen2-tied", text)
    folder = export(mllm, tmp_path / "out")
    layout, vocabulary, own = (
        json.loads((folder / "larp.json").read_text()),
        mllm.model.vocabulary,
        mllm.processor.tokenizer,
    )
    loaded, words = getattr(transformers, layout["tokenizer_class"]).from_pretrained(folder), layout["words"]
    assert len(loaded) == vocabulary.size == max(loaded.get_vocab().values()) + 1
    names = [words["video_start"], words["video_end"], *(words["code"].format(code) for code in range(16))]
    assert loaded.convert_tokens_to_ids(names) == list(range(vocabulary.text_size, vocabulary.size))
    assert not set(names) & set(own.get_vocab())
    typed = f"a person  surfing\n{names[0]}{names[5]}{names[1]}"
    assert loaded.encode(typed, add_special_tokens=False)[-3:] == [
        vocabulary.video_start,
        vocabulary.first_code + 3,
        vocabulary.video_end,
    ]
    for plain in (typed, "Ein Mann fährt Rad 🚲 12345 Don't"):
        ids = loaded.encode(plain, add_special_tokens=False, split_special_tokens=True)
        assert ids == own.encode(plain, add_special_tokens=False, split_special_tokens=True)
    assert loaded.decode([vocabulary.first_code, vocabulary.text_size - 1], skip_special_tokens=True).strip() == ""
    assert loaded.bos_token_id == own.bos_token_id and loaded.eos_token_id == own.eos_token_id


def test_names_of_the_base_are_not_reused(tmp_path):
    mllm = make(tmp_path, text="with_video_words")
    layout = json.loads((export(mllm, tmp_path / "out") / "larp.json").read_text())
    assert layout["words"] == {
        "video_start": "<|larp_video_start|>",
        "video_end": "<|larp_video_end|>",
        "code": "<|larp_code_{}|>",
    }
    assert "<|larp_video_start|>" in (tmp_path / "out" / "README.md").read_text()


@torch.no_grad()
def test_a_tokenizer_with_more_tokens_than_the_base_has_rows(tmp_path):
    mllm = make(tmp_path, rows=99)
    vocabulary = mllm.model.vocabulary
    folder = export(mllm, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(folder)
    ids, missing = mixed_ids(mllm), list(range(99, vocabulary.text_size))
    ours, theirs = every_logit(mllm.model, ids), stock(ids).logits
    there = torch.ones(vocabulary.size, dtype=torch.bool)
    there[missing] = False
    torch.testing.assert_close(theirs[..., there], ours[..., there], atol=1e-5, rtol=0)
    assert not theirs[..., missing].any()
    assert json.loads((folder / "larp.json").read_text())["missing_text_ids"] == missing
    assert f"The ids 99 to {missing[-1]} are tokens" in (folder / "README.md").read_text()
    for seed in range(3):
        torch.manual_seed(seed)
        written = stock.generate(ids[:1, :4], max_new_tokens=40, do_sample=True, temperature=100.0, top_k=0)
        assert not set(written[0, 4:].tolist()) & set(missing)


@torch.no_grad()
def test_lora_is_merged(tmp_path):
    mllm = make(tmp_path)
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    ids, before = mixed_ids(mllm), stock_model(mllm.model)
    peft = LoraModel(mllm.model.base, settings, "default")
    ours = every_logit(mllm.model.eval(), ids)
    folder = export(mllm, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(stock(ids).logits, ours, atol=1e-5, rtol=0)
    assert not any("lora" in name or "base_layer" in name for name in stock.state_dict())
    assert not torch.allclose(
        before.model.layers[0].self_attn.q_proj.weight, stock.model.layers[0].self_attn.q_proj.weight
    )
    # The model in memory goes on training as it was.
    torch.testing.assert_close(every_logit(mllm.model, ids), ours)
    assert any("lora_A" in name for name, _ in peft.named_parameters())


_WITH_CUSTOM_CODE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.load(sys.argv[2])
with torch.no_grad():
    found = {"logits": model(ids).logits, "ids": model.generate(ids, max_new_tokens=6, do_sample=False)}
torch.save(found, sys.argv[3])
assert not any(name.startswith("larp") for name in sys.modules), "larp_mllm was imported"
"""


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2-tied", "llama3-tied", pytest.param("qwen3.5", marks=pytest.mark.slow)])
def test_partial_lora_is_exported_with_its_code(family, tmp_path):
    mllm = make(tmp_path, family)
    mllm.model.add_partial_lora(4)
    for name, parameter in mllm.model.named_parameters():
        if name.endswith("lora_up"):
            parameter.normal_(std=0.3)
    folder = export(mllm, tmp_path / "out")
    torch.save(ids := mixed_ids(mllm), tmp_path / "ids.pt")
    # Another process, in which no class of ours is registered.
    arguments = [folder, tmp_path / "ids.pt", tmp_path / "found.pt"]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", _WITH_CUSTOM_CODE, *arguments], check=True, cwd=tmp_path, env=environment)
    found = torch.load(tmp_path / "found.pt")
    torch.testing.assert_close(found["logits"], every_logit(mllm.model, ids), atol=1e-5, rtol=0)
    rules = [SpanRules(mllm.model.vocabulary)]  # the export's own generate has them
    assert torch.equal(
        found["ids"], mllm.model.generate(ids, max_new_tokens=6, do_sample=False, logits_processor=rules)
    )
    layout = json.loads((folder / "larp.json").read_text())
    assert (
        layout["tokenizer_class"] == "AutoTokenizer"
        and len(AutoTokenizer.from_pretrained(folder)) == layout["first_code"] + 16
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_the_code_of_an_export_names_the_config_of_the_base_and_its_layers(tmp_path):
    mllm = make(tmp_path, "qwen3.5")
    mllm.model.add_partial_lora(4)
    folder = export(mllm, tmp_path / "out")
    assert "class PartialLoraConfig(Qwen3_5TextConfig):" in (folder / "modeling_partial_lora.py").read_text()
    layers = json.loads((folder / "config.json").read_text())["partial_lora_layers"]
    assert {"in_proj_qkv", "out_proj", "q_proj", "down_proj"} < set(layers)


def test_guidance_of_transformers_equals_ours(tmp_path):
    mllm = make(tmp_path)
    folder = export(mllm, tmp_path / "out")
    layout, process = json.loads((folder / "larp.json").read_text()), mllm.processor
    stock = AutoModelForCausalLM.from_pretrained(folder)
    options = {"guidance_scale": 3.0, "negative_prompt_ids": torch.tensor([process.layout.prompt([])])}
    codes = []
    for text in ("a person surfing", "the man plays the violin", "two people"):
        ids = sample(stock, layout, process.layout.prompt(process.encode_text(text)), **options)
        codes.append(tuple(i - layout["first_code"] for i in ids))
    texts = ["a person surfing", "the man plays the violin", "two people"]
    ours = mllm.generate(texts, sampling=VideoSampling(guidance_scale=3.0, temperature=0.0))
    assert codes == [video.codes for video in ours]


def test_generation_defaults_and_stops(tmp_path):
    mllm = make(tmp_path)
    mllm.model.base.generation_config.repetition_penalty = 1.1
    folder = export(mllm, tmp_path / "out")
    defaults = json.loads((folder / "generation_config.json").read_text())
    assert "repetition_penalty" not in defaults
    tokenizer = mllm.processor.tokenizer
    assert tokenizer.eos_token_id in defaults["eos_token_id"]
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


def test_shards_and_dtype(tmp_path):
    folder = export(make(tmp_path), tmp_path / "out", dtype=torch.bfloat16, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in stock.parameters()} == {torch.bfloat16}
    assert not list(folder.rglob("*.bin"))


def test_a_failed_export_leaves_what_was_there(tmp_path, monkeypatch):
    mllm, out = make(tmp_path), tmp_path / "deep" / "out"
    with monkeypatch.context() as patch:
        patch.setattr("larp_mllm.export.checkpoint.readme", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export(mllm, out)
    assert list(out.parent.iterdir()) == []
    out.mkdir()
    export(mllm, out)
    assert (out.stat().st_mode & 0o777) == (out.parent.stat().st_mode & 0o777)
    assert len({file.stat().st_mode for file in out.glob("*.*")}) == 1  # who may read one may read all
    assert [folder.name for folder in out.parent.iterdir()] == ["out"]
    with pytest.raises(ValueError, match=r"holds an earlier export: give overwrite"):
        export(mllm, out)
    (out / "old").touch()
    export(mllm, out, overwrite=True)
    assert not (out / "old").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").touch()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is not an earlier export: give a new folder"):
            export(mllm, mine, overwrite=overwrite)
    assert [file.name for file in mine.iterdir()] == ["thesis.txt"]


def test_a_full_disk_is_one_message_and_leaves_nothing(qwen, tmp_path, monkeypatch, full_disk):
    out = tmp_path / "out"
    refusal = pytest.raises(ValueError, match=rf"^{out} cannot be written \(.*File too large.*\): free space there")
    with full_disk(), refusal:  # by its words
        export(qwen, out)
    monkeypatch.setattr("larp_mllm.export.checkpoint.add_tokens", lambda tokenizer, *_: (tokenizer, {}))
    monkeypatch.setattr("larp_mllm.export.checkpoint.loader_of", lambda *_: "AutoTokenizer")
    with full_disk(), refusal:  # by its weights
        export(qwen, out)
    assert not list(tmp_path.iterdir())
    with full_disk(), refusal:
        qwen.save(out)


@pytest.mark.parametrize(
    "to, words",
    [
        ("/proc/x", "/proc takes no files"),
        ("/proc", "takes no files|not an earlier export"),
        ("/", "not an earlier export"),
    ],
)
def test_an_unwritable_target_is_refused_before_a_model_is_loaded(to, words, monkeypatch, capsys):
    monkeypatch.setattr("larp_mllm.locate.find_model", lambda *_: pytest.fail("a model was looked for"))
    with pytest.raises(ValueError, match=words):
        export("gone", to)
    with pytest.raises(SystemExit):
        main(["export", "--to", to])
    assert re.search(words, capsys.readouterr().err)


def test_ids_that_are_not_one_video_are_refused(tmp_path):
    folder = export(make(tmp_path), tmp_path / "out")
    first = json.loads((folder / "larp.json").read_text())["first_code"]
    with pytest.raises(ValueError, match=rf"id 7 is not a code: .* ids {first} to {first + 15}"):
        read_video_ids(folder, [first, first + 1, 7, first])
    with pytest.raises(ValueError, match="has 4 codes, got 3"):
        read_video_ids(folder, torch.tensor([first] * 3))
    with pytest.raises(ValueError, match=r"is not an export: larp\.json is missing"):
        read_video_ids(tmp_path, [first] * 4)


def test_the_command(qwen, tmp_path, capsys):
    qwen.save(tmp_path / "model")
    main(["export", "--model", str(tmp_path / "model"), "--to", str(tmp_path / "out"), "--dtype", "bfloat16"])
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path / 'out'}\n" and "README.md" in shown.err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    # transformers reads the tiny tokenizer as another one for Qwen2; the README says so.
    assert "PreTrainedTokenizerFast.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(SystemExit) as stopped:
        main(["export", "--model", str(tmp_path / "model"), "--to", str(tmp_path / "out")])
    assert stopped.value.code == 2 and "--overwrite" in capsys.readouterr().err


@pytest.mark.slow
def test_the_output_of_the_command_is_the_folder_alone(qwen, tmp_path):
    qwen.save(tmp_path / "model")
    command = ["-m", "larp_mllm.cli", "export", "--model", str(tmp_path / "model"), "--to", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.stdout == f"{tmp_path / 'out'}\n" and done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_the_commands_of_the_readme_run(rank, tmp_path):
    mllm = make(tmp_path, "llama2")
    if rank:
        mllm.model.add_partial_lora(rank)
    folder = export(mllm, tmp_path / "out")
    plain, frames, *vllm = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.S)
    check = "import sys\nassert not any(name.startswith('larp') for name in sys.modules)\nassert len(ids) == 4\n"
    done = subprocess.run([sys.executable, "-c", plain + check + frames], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "surfing.mp4").stat().st_size > 0
    assert len(vllm) == (not rank)
    for code in vllm:
        compile(code, "README.md", "exec")


@pytest.mark.slow
def test_a_large_vocabulary_takes_seconds(tmp_path):
    from larp_mllm.export.token_names import add_tokens
    from larp_mllm.model.vocabulary import Vocabulary

    words = {f"w{i}": i for i in range(151_643)}
    tokenizer = tokenizers.Qwen2Tokenizer(vocab=words | {"<|endoftext|>": len(words)}, merges=[])
    vocabulary = Vocabulary(151_936, 8192, 1024)
    began = time.process_time()
    add_tokens(tokenizer, vocabulary, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.convert_tokens_to_ids("<|code_8191|>") == vocabulary.size - 1
    assert time.process_time() - began < 30
