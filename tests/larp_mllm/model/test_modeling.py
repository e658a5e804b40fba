"""LarpMllmForCausalLM: the base unchanged, the loss, saving and loading, damaged checkpoints."""

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from larp_mllm.model.base_models import load_base
from larp_mllm.model.configuration import LarpMllmConfig
from larp_mllm.model.modeling import IGNORE, LarpMllmForCausalLM
from larp_mllm.pipeline import Mllm
from tests.larp_mllm.families import FAMILIES
from tests.larp_mllm.tiny import tiny_mllm

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, Gemma2Config
from transformers.utils import hub, logging


def mixed_ids(mllm, rows=3, length=9):
    return torch.randint(0, mllm.model.vocabulary.size, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("base", ["tiny-qwen2", "tiny-llama"])
def test_text_logits_are_bit_identical_to_the_base(base):
    torch.manual_seed(0)
    language_model, text_tokenizer = load_base(base, ["a red circle"], layers=2, width=32, heads=2)
    language_model.eval()
    assert language_model.config.tie_word_embeddings == (base == "tiny-qwen2")
    ids = torch.randint(0, len(text_tokenizer), (2, 7))
    before, weights = language_model(ids).logits, {k: v.clone() for k, v in language_model.state_dict().items()}
    model = LarpMllmForCausalLM.from_base(language_model, len(text_tokenizer), torch.randn(16, 4), 4)
    assert all(torch.equal(v, weights[k]) for k, v in model.base.state_dict().items())
    logits = model(ids).logits
    assert logits.shape[-1] == model.vocabulary.size
    assert torch.equal(logits[..., : language_model.config.vocab_size], before)


def test_ids_without_a_row_in_the_base_get_no_probability(mllm):
    base = mllm.model.base
    model = LarpMllmForCausalLM.from_base(base, base.config.vocab_size + 3, torch.randn(16, 4), 4)
    logits = model(torch.tensor([[1, 2]])).logits
    assert logits.shape[-1] == base.config.vocab_size + 3 + 2 + 16
    assert torch.isinf(logits[..., base.config.vocab_size : model.vocabulary.text_size]).all()


def test_the_adapter_is_on_the_device_of_the_base(mllm):
    # "meta" stands for a GPU: tensors of two devices do not mix.
    with torch.device("meta"):
        base, codebook = AutoModelForCausalLM.from_config(mllm.model.base.config), torch.randn(16, 4)
    model = LarpMllmForCausalLM.from_base(base, 0, codebook, 4)
    assert {one.device.type for one in (*model.parameters(), *model.buffers())} == {"meta"}


def test_loss_equals_the_cross_entropy_of_all_logits(mllm):
    model, v = mllm.model, mllm.model.vocabulary
    rows = [[5, *v.span([1, 2, 3, 0]), 7, 8], [*v.span([15, 3, 3, 9]), 6, 5], [9, 8, 7, *v.span([0, 1, 0, 4])]]
    ids = torch.tensor([row[:8] for row in rows])  # the last video is cut off
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.3, IGNORE)
    out = model(ids, labels=labels)
    logits, targets = model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    is_code, is_text = targets >= v.video_end, (targets >= 0) & (targets < v.video_end)
    video, text = (F.cross_entropy(logits[kind], targets[kind], reduction="sum") for kind in (is_code, is_text))
    torch.testing.assert_close(out.video_nll, video)
    torch.testing.assert_close(out.text_nll, text)
    torch.testing.assert_close(out.loss, (video + text) / (is_code.sum() + is_text.sum()))
    assert (int(out.video_count), int(out.text_count)) == (int(is_code.sum()), int(is_text.sum()))
    weighted = model(ids, labels=labels, num_items_in_batch=10.0, text_weight=0.5)
    torch.testing.assert_close(weighted.loss, (video + 0.5 * text) / 10)


def test_no_text_logits_are_computed_for_code_targets(qwen):
    model, v = qwen.model, qwen.model.vocabulary
    seen = []
    hook = model.base.get_output_embeddings().register_forward_hook(lambda m, inputs, out: seen.append(out.numel()))
    ids = torch.tensor([[1, *v.span([1, 2, 3, 4])]])
    labels = ids.masked_fill(ids < v.video_end, IGNORE)
    model(ids, labels=labels)
    hook.remove()
    assert seen == [0]


def test_every_parameter_gets_a_gradient_even_without_text_targets(qwen):
    model, v = qwen.model, qwen.model.vocabulary
    ids = torch.tensor([[1, *v.span([1, 2, 3, 4])]])
    model(ids, labels=ids.masked_fill(~v.is_code(ids), IGNORE)).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    model.zero_grad()
    assert missing == []


def test_padding_on_the_right_changes_nothing(mllm):
    ids = mixed_ids(mllm, rows=1)
    padded = F.pad(ids, (0, 5))
    torch.testing.assert_close(mllm.model(padded).logits[:, :9], mllm.model(ids).logits)


def test_unknown_adapter_is_refused():
    with pytest.raises(ValueError, match="codebook, free"):
        tiny_mllm(adapter="codebok")


def test_a_model_pushed_to_the_hub_loads_again(qwen, tmp_path, monkeypatch):
    uploaded = tmp_path / "hub"

    def create_commit(operations, **_):
        for operation in operations:
            file = uploaded / operation.path_in_repo
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(Path(operation.path_or_fileobj).read_bytes())

    created = []
    api = SimpleNamespace(
        create_repo=lambda name, **_: created.append(name) or SimpleNamespace(repo_id=name), create_commit=create_commit
    )
    monkeypatch.setattr(hub, "hf_api", lambda: api)
    card = SimpleNamespace(save=lambda path: Path(path).write_text("# card"))
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: card)
    qwen.model.push_to_hub("someone/videos")
    assert created == ["someone/videos"]
    names = {file.name for file in uploaded.iterdir()}
    assert (
        {"config.json", "model.safetensors"}
        <= names
        <= {"config.json", "model.safetensors", "generation_config.json", "README.md"}
    )
    again = AutoModelForCausalLM.from_pretrained(uploaded).eval()
    ids = mixed_ids(qwen)
    assert torch.equal(again(ids).logits, qwen.model(ids).logits)


@pytest.fixture
def saved(qwen, tmp_path):
    """A function that changes config.json and tensors of a model folder, and returns it."""
    qwen.save(tmp_path)

    def change(fields=(), text_fields=(), tensors=()):
        config = json.loads((tmp_path / "config.json").read_text())
        config["text_config"].update(text_fields)
        config.update(fields)
        (tmp_path / "config.json").write_text(json.dumps(config))
        weights = load_file(tmp_path / "model.safetensors") | dict(tensors)
        weights = {name: value for name, value in weights.items() if value is not None}
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return change


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tensors": {"adapter.codebook": None}}, "adapter.codebook is missing"),
        ({"tensors": {"adapter.other": torch.zeros(1)}}, "adapter.other is unknown"),
        (
            {"tensors": {"adapter.codebook": torch.zeros(17, 4)}},
            r"adapter.codebook has shape \(17, 4\) in place of \(16, 4\)",
        ),
        ({"fields": {"code_dim": 5}}, r"mlp.0.weight has shape \(32, 4\) in place of \(32, 5\).*belong together"),
        ({"fields": {"adapter": "free"}}, r"adapter.code_input.mlp.0.bias is unknown; .* and \d+ more"),
        (
            {"tensors": {"base.model.norm.weight": torch.full((32,), torch.nan)}},
            "tensor base.model.norm.weight holds NaN",
        ),
        (
            {"tensors": {"adapter.codebook": torch.full((16, 4), torch.inf)}},
            "tensor adapter.codebook holds NaN or infin",
        ),
        ({"text_fields": {"hidden_size": 10**7}}, r"has shape \(32,\) in place of \(10000000,\)"),
        (
            {"text_fields": {"num_hidden_layers": 1000, "layer_types": None}},
            r"num_hidden_layers = 1000, .* only \d+ tens",
        ),
        (
            {"text_fields": {"num_attention_heads": 0}},
            "describes a model that cannot be built .*Restore the config.json",
        ),
        (
            {"text_fields": {"model_type": "nope"}},
            "model_type 'nope', which this version of transformers does not know",
        ),
        ({"fields": {"model_type": "llama"}}, "config.json is missing, or not that of a larp_mllm model"),
        ({"text_fields": {"model_type": "vit"}}, "says that the base is a vit, which is no causal language model"),
    ],
)
def test_a_damaged_model_is_refused_in_one_line(saved, caplog, capfd, changes, message):
    folder = saved(**changes)
    with caplog.at_level("INFO"), logs_of_transformers(caplog), pytest.raises(ValueError, match=message) as refused:
        LarpMllmForCausalLM.from_pretrained(folder)
    assert "\n" not in str(refused.value) and not caplog.records  # no tables or warnings of transformers
    shown = capfd.readouterr()
    assert shown.out == "" and "LOAD REPORT" not in shown.err


@contextmanager
def logs_of_transformers(caplog):
    """Let `caplog` record the logs of transformers."""
    logging.add_handler(caplog.handler)
    yield
    logging.remove_handler(caplog.handler)


def test_pickled_weights_are_never_loaded(saved, tmp_path):
    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    folder = saved()
    (folder / "model.safetensors").rename(folder / "hidden")
    torch.save({"adapter.codebook": Attack()}, folder / "pytorch_model.bin")
    index = {"weight_map": {"adapter.codebook": "pytorch_model.bin"}}
    for load in (LarpMllmForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained, Mllm.load):
        with pytest.raises(
            ValueError,
            match=r"holds pickled weights \(pytorch_model.bin\).*: if you trust them, convert them to model.saf",
        ):
            load(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names 'pytorch_model.bin', expected safetensors files"):
        LarpMllmForCausalLM.from_pretrained(folder)
    (folder / "hidden").rename(folder / "model.safetensors")
    LarpMllmForCausalLM.from_pretrained(folder)  # safetensors takes precedence
    assert not (tmp_path / "ran").exists()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"an adapter of peft \(adapter_config.json\)"):
        LarpMllmForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"text_size": 50}, r"text_size is 50, below the base model's \d+ embedding rows.*Restore"),
        ({"text_size": "many"}, "text_size must be a whole number of at least 1, got 'many'"),
        ({"frame_stride": True}, "frame_stride must be a whole number of at least 1, got True"),
        ({"fps": True}, "fps must be a number above 0, got True"),
        ({"codebook_size": 0}, "codebook_size must be a whole number of at least 1, got 0"),
        ({"tokens_per_video": -1}, "tokens_per_video must be a whole number of at least 1, got -1"),
        ({"frame_stride": 0}, "frame_stride must be a whole number of at least 1"),
        ({"given_frames": -1}, "given_frames must be a whole number of at least 0, got -1"),
        ({"fps": 0}, "fps must be a number above 0, got 0"),
        ({"adapter": "codebok"}, "adapter must be one of codebook, free, got 'codebok'"),
        ({"text_config": 3}, "config.json of a larp_mllm model: .*copy the model folder again"),
    ],
)
def test_an_invalid_config_is_refused_when_it_is_loaded(qwen, fields, message):
    good = qwen.model.config.to_dict()
    assert LarpMllmConfig.from_dict(good).vocabulary == qwen.model.vocabulary
    with pytest.raises(ValueError, match=message):
        LarpMllmConfig.from_dict(good | fields)


def test_a_config_saves_the_number_of_given_frames(qwen, tmp_path):
    assert qwen.model.config.given_frames == 0
    LarpMllmConfig.from_dict(qwen.model.config.to_dict() | {"given_frames": 3}).save_pretrained(tmp_path)
    assert LarpMllmConfig.from_pretrained(tmp_path).given_frames == 3


def test_bases_that_cannot_be_wrapped_are_refused():
    codebook = torch.randn(16, 4)
    bare = AutoModel.from_config(FAMILIES["llama2"]())
    with pytest.raises(ValueError, match=r"\(LlamaModel\) has no language-model head.*AutoModelForCausalLM"):
        LarpMllmForCausalLM.from_base(bare, 0, codebook, 4)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    gemma = AutoModelForCausalLM.from_config(Gemma2Config(**sizes, num_key_value_heads=1, head_dim=16))
    with pytest.raises(
        ValueError, match=r"gemma2\) changes its logits after the head \(final_logit_softcapping = 30.0\)"
    ):
        LarpMllmForCausalLM.from_base(gemma, 0, codebook, 4)
    base = AutoModelForCausalLM.from_config(FAMILIES["llama2"]())
    with pytest.raises(ValueError, match=r"a table \(codes, width\), got shape \(16,\)"):
        LarpMllmForCausalLM.from_base(base, 0, codebook[:, 0], 4)


def test_a_text_id_that_the_base_has_no_row_for_is_named():
    base = AutoModelForCausalLM.from_config(FAMILIES["llama2"]())
    model = LarpMllmForCausalLM.from_base(base, 103, torch.randn(16, 4), 4)
    known, unknown = torch.tensor([[5, 98, 103, 105, 104]]), torch.tensor([[5, 101, 103, 105, 104]])
    loss = model(known, labels=known).loss
    assert torch.isfinite(loss) and (model(known).logits[0].softmax(-1)[:, 99:103] == 0).all()
    with pytest.raises(ValueError, match=r"text id 101 .* no row for \(it has 99\)"):
        model(unknown)
    with pytest.raises(ValueError, match="text id 101"):
        model(known, labels=unknown)
