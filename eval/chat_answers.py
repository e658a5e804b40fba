"""What a language model says in a chat before and after it learned video, in one command:

    python eval/chat_answers.py --model runs/mllm --base SmolLM2-135M-Instruct --out chat-answers.json

Ten plain questions should be answered as the base answers them, word for word; a request for a video in words that training never saw
with a video; a message without such a wish with none. The prompts are in eval/chat_prompts.json: of forty requests and forty other
messages, the last twenty were written by somebody who knew neither the training data nor a model. Answers are the most probable ones.
Also measured: the perplexity of the held-out text that comes with the package.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from larp.config import to_dict
from larp.engine.signals import run_script
from larp.files import write_json
from larp.metrics.evaluation import RecordConfig, run_evaluation
from larp.metrics.protocols import checkpoint_hashes, versions
from larp_mllm.data.corpus import TEXT_LENGTH
from larp_mllm.data.text_data import shipped_text
from larp_mllm.engine.perplexity import text_perplexity
from larp_mllm.generation.decode import decode_answer
from larp_mllm.generation.sampling import TextSampling, VideoSampling
from larp_mllm.locate import find_model
from larp_mllm.model.base_models import load_base
from larp_mllm.pipeline import Mllm
from larp_mllm.processing.chat import stop_ids

import torch
from tqdm import tqdm

PROMPTS = Path(__file__).with_name("chat_prompts.json")
VIDEO = " <video>"


@dataclass(frozen=True)
class ChatAnswersConfig(RecordConfig):
    """Compare the chat answers of a language model with those of its base."""

    needed: ClassVar[tuple[str, ...]] = ("base",)

    model: Path | None = None
    """Folder of the model, or of the run that trained it; by default LARP_MLLM_MODEL, else the newest one trained here."""
    base: str = ""
    """The base that it was trained from, as in training (needed)."""
    max_new_tokens: int = 48
    """Most ids of an answer."""
    out: Path = Path("chat-answers.json")


def evaluate(config: ChatAnswersConfig) -> dict[str, Any]:
    """Ask both models, write the JSON, and return its content."""
    config.check_paths()
    folder = find_model(config.model)
    mllm = Mllm.load(folder, config.device)
    base, tokenizer = load_base(config.base)
    base = base.to(config.device).eval()
    if not tokenizer.chat_template:
        raise ValueError(
            f"--base {config.base} has no chat template, so it answers nothing: give an instruction-tuned base"
        )
    prompts = json.loads(PROMPTS.read_text(encoding="utf-8"))
    plain = []
    for question in tqdm(prompts["plain"], desc="plain questions", delay=2):
        before = base_answer(base, tokenizer, question, config.max_new_tokens)
        after = answer(mllm, question, config.max_new_tokens)
        plain.append({"question": question, "before": before, "after": after, "same": before == after})
    asked = {
        name: [
            {
                "prompt": prompt,
                "video": (text := answer(mllm, prompt, config.max_new_tokens)).endswith(VIDEO),
                "text": text,
            }
            for prompt in tqdm(prompts[name], desc=name, delay=2)
        ]
        for name in ("requests", "without")
    }
    before, after = (
        text_perplexity(model, mllm.processor, shipped_text(), TEXT_LENGTH)["perplexity"]
        for model in (base, mllm.model)
    )
    record = {
        "same_answers": sum(row["same"] for row in plain),
        "videos_for_requests": sum(row["video"] for row in asked["requests"]),
        "videos_for_other_questions": sum(row["video"] for row in asked["without"]),
        "perplexity": {"before": before, "after": after},
        "plain": plain,
        **asked,
        "checkpoint": checkpoint_hashes(folder),
        "versions": versions("transformers"),
        "config": to_dict(config),
    }
    write_json(config.out, record)
    return record


@torch.no_grad()
def base_answer(base, tokenizer, question: str, most: int) -> str:
    """Return the base's most probable answer, by transformers' own generation."""
    chat = [{"role": "user", "content": question}]
    given = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    given = given.to(base.device)
    ids = base.generate(**given, max_new_tokens=most, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def answer(mllm: Mllm, question: str, most: int) -> str:
    """Return the model's most probable answer, up to a video: `VIDEO` stands for its codes, which are not sampled."""
    prompt = mllm.chat_prompt([{"role": "user", "content": question}])
    ids, stops = [], stop_ids(mllm.processor.tokenizer)
    for token in decode_answer(
        mllm.model, prompt, [], VideoSampling(guidance_scale=1.0), TextSampling(max_new_tokens=most), stops, 1
    ):
        if token == mllm.model.vocabulary.video_start:
            return mllm.processor.decode_text(ids).strip() + VIDEO
        ids.append(token)
    return mllm.processor.decode_text(ids).strip()


def describe(record: dict[str, Any]) -> str:
    """Return the figures of a record as text to print."""
    lines = []
    for row in record["plain"]:
        lines += [row["question"], f"  {row['before']!r}"] + ([] if row["same"] else [f"  now {row['after']!r}"])
    wrong = [row for row in record["requests"] if not row["video"]] + [row for row in record["without"] if row["video"]]
    lines += [f"{row['prompt']}\n  {row['text']!r}" for row in wrong]
    perplexity = record["perplexity"]
    lines += [
        f"plain questions answered as before, word for word: {record['same_answers']} of {len(record['plain'])}",
        f"requests answered with a video: {record['videos_for_requests']} of {len(record['requests'])}",
        f"other questions answered with a video: {record['videos_for_other_questions']} of {len(record['without'])}",
        f"perplexity of held-out text: {perplexity['before']:.2f} before, {perplexity['after']:.2f} after "
        f"({perplexity['after'] / perplexity['before'] - 1:+.1%})",
    ]
    return "\n".join(lines)


main = partial(run_evaluation, __file__, ChatAnswersConfig, evaluate, describe)

if __name__ == "__main__":
    run_script("chat_answers.py", main)
