"""TRL's trainers on a model with video ids, and transformers' ways to generate: with an assistant, batched continuously."""

import copy
import math

from larp.data.video import write_video
from larp_mllm.model.modeling import LarpMllmForCausalLM
from tests.larp_mllm.families import FAMILIES
from tests.larp_mllm.tiny import CAPTIONS, tiny_mllm

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig


def video_rows(mllm) -> list[list[int]]:
    v, encode = mllm.model.vocabulary, mllm.processor.encode_text
    return [[*encode(text), *v.span([i, 3, 2, 1]), *encode("ends")] for i, text in enumerate(CAPTIONS)]


def turn(role: str, content: str | list[dict]) -> list[dict]:
    """A message, in the one form that a data set can hold."""
    return [{"role": role, "content": [{"type": "text", "text": content}] if isinstance(content, str) else content}]


def asked_of_a_video(folder) -> list[dict]:
    write_video(folder / "x.mp4", np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8), 8)
    return [{"type": "video", "path": str(folder / "x.mp4")}, {"type": "text", "text": "what is it?"}]


def settings_of_trl() -> dict:
    return dict(
        per_device_train_batch_size=4, max_steps=2, logging_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True, bf16=False,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows, processing_class",
    [
        *(("text", "processor"), ("text", "tokenizer"), ("ids", "processor"), ("ids", "tokenizer")),
        *(("chats", "processor"), ("videos", "processor")),
    ],
)
def test_sft_trainer_gives_our_loss_and_trains(tmp_path, rows, processing_class):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    mllm = tiny_mllm()
    question = asked_of_a_video(tmp_path) if rows == "videos" else "what is it?"
    chats = [[*turn("user", question), *turn("assistant", text)] for text in CAPTIONS]
    given = {"text": {"text": CAPTIONS}, "ids": {"input_ids": video_rows(mllm)}}.get(rows, {"messages": chats})
    settings = trl.SFTConfig(tmp_path, max_length=64, **settings_of_trl())
    processor = mllm.processor if processing_class == "processor" else mllm.processor.tokenizer
    trainer = trl.SFTTrainer(
        mllm.model, settings, train_dataset=datasets.Dataset.from_dict(given), processing_class=processor
    )
    batch = next(iter(trainer.get_train_dataloader()))
    batch = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        theirs = trainer.compute_loss(mllm.model, dict(batch)).item()
        ours = mllm.model(**batch).loss.item()
    assert theirs == pytest.approx(ours, abs=1e-5)
    assert (batch["labels"] >= mllm.model.vocabulary.first_code).any() == (rows in ("ids", "videos"))
    assert rows == "ids" or (batch["labels"] == mllm.processor.tokenizer.eos_token_id).any(1).all()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(ours, abs=1e-3) and losses[1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["a copy", "its folder"])
def test_dpo_trainer_prefers_the_answers_that_are_chosen(tmp_path, reference):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    mllm = tiny_mllm()
    mllm.save(tmp_path / "model")
    model = LarpMllmForCausalLM.from_pretrained(tmp_path / "model")
    asked = turn("user", asked_of_a_video(tmp_path))
    rows = [
        {"prompt": asked, "chosen": turn("assistant", text), "rejected": turn("assistant", "a")} for text in CAPTIONS
    ]
    trainer = trl.DPOTrainer(
        *(model, copy.deepcopy(model) if reference == "a copy" else None),
        args=trl.DPOConfig(tmp_path, **settings_of_trl() | {"max_steps": 4}),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=mllm.processor,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0]


@pytest.mark.slow
def test_grpo_trainer_takes_the_tokenizer(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    mllm = tiny_mllm()
    settings = trl.GRPOConfig(tmp_path, num_generations=2, max_completion_length=6, **settings_of_trl())
    rows = datasets.Dataset.from_dict({"prompt": ["a red"] * 4})

    def train(processor):
        trainer = trl.GRPOTrainer(
            mllm.model, lambda completions, **_: [len(text) for text in completions], settings, rows,
            processing_class=processor,
        )  # fmt: skip
        trainer.train()
        return trainer.state.global_step

    with pytest.raises(AttributeError, match=r"has no image_token_id: give GRPO .*=processor\.tokenizer"):
        train(mllm.processor)
    assert not hasattr(mllm.model.config, "image_token_id")
    assert train(mllm.processor.tokenizer) == 2


@pytest.mark.parametrize("helper", ["assistant", "prompt"])
def test_assisted_decoding_gives_the_codes_of_greedy_decoding(helper):
    torch.manual_seed(0)
    base, small = (AutoModelForCausalLM.from_config(FAMILIES[name]()) for name in ("qwen2-untied", "qwen2-tied"))
    codebook = torch.randn(16, 4)
    model, assistant = (LarpMllmForCausalLM.from_base(one, 99, codebook, 12).eval() for one in (base, small))
    v = model.vocabulary
    prompt = torch.tensor([[5, 6, 7, *v.span([1, 2, 3, 4] * 3), 5, 6, v.video_start, v.code_to_id(1), v.code_to_id(2)]])
    options = dict(attention_mask=prompt * 0 + 1, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    greedy = model.generate(prompt, **options)
    with_help = {"assistant_model": assistant} if helper == "assistant" else {"prompt_lookup_num_tokens": 3}
    assert torch.equal(model.generate(prompt, **options, **with_help), greedy)
    assert v.is_code(greedy[0, prompt.shape[1] :]).any()


def test_continuous_batching_gives_the_ids_of_greedy_decoding():
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(FAMILIES["qwen2-tied"]())
    model = LarpMllmForCausalLM.from_base(base, 99, torch.randn(16, 4), 12).eval()
    v = model.vocabulary
    rows = [[5, 6, 7, *v.span([1, 2, 3, 4] * 3), 5, 6], [*v.span([2, 1, 3, 0] * 3), 8, v.video_start]]
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    expected = [
        model.generate(torch.tensor([row]), eos_token_id=None, **options)[0, len(row) :].tolist() for row in rows
    ]
    found = model.generate_batch(
        rows,
        generation_config=GenerationConfig(eos_token_id=-1, **options),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64),
    )
    assert [found[name].generated_tokens for name in sorted(found)] == expected and v.is_code(
        torch.tensor(expected[1])
    ).any()


def test_generate_takes_what_it_does_not_hand_to_the_model():
    mllm = tiny_mllm()
    prompt = mllm.processor("a red", return_tensors="pt")
    options = dict(max_new_tokens=3, do_sample=False, eos_token_id=None)
    tokenizer = mllm.processor.tokenizer
    plain = mllm.model.generate(**prompt, **options)
    assert torch.equal(mllm.model.generate(**prompt, **options, stop_strings=["\0"], tokenizer=tokenizer), plain)
    with pytest.raises(ValueError, match=r"not used by the model.*foo"):
        mllm.model.generate(**prompt, **options, foo=3)
