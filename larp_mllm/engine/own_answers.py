"""The base's own answers to plain questions, mixed into the training so that it goes on answering in words.

A model that is trained on requests for videos alone soon answers everything with a video. Its own earlier answers are the
text that changes it least, and need no data.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from larp.files import write_text
from larp_mllm.data.records import RecordSet, open_records
from larp_mllm.generation.decode import decode_text
from larp_mllm.generation.sampling import TextSampling
from larp_mllm.pipeline import Mllm
from larp_mllm.processing.chat import stop_ids

from tqdm import tqdm

QUESTIONS = Path(__file__).parents[1] / "data" / "questions.txt"
"""Questions without a wish for a video, one a line; many are about what videos show."""
_SAMPLING = TextSampling(max_new_tokens=64)
_BATCH = 16  # questions at a time


def own_answers(mllm: Mllm, path: Path) -> RecordSet | None:
    """Read the base's answers, after asking it if `path` (JSONL) is missing; None for a base without a chat template.

    Raises ValueError for a file that does not hold records.
    """
    if not mllm.processor.tokenizer.chat_template:
        return None
    if not path.exists():
        questions = QUESTIONS.read_text(encoding="utf-8").splitlines()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in _asked(mllm, questions)))
    return open_records(path, mllm.processor, cache=path.parent)


def _asked(mllm: Mllm, questions: list[str]) -> Iterator[dict[str, Any]]:
    """Yield each question with the base's most probable answer as a chat."""
    processor, stops = mllm.processor, stop_ids(mllm.processor.tokenizer)
    prompts = [mllm.chat_prompt([{"role": "user", "content": question}]) for question in questions]
    training = mllm.model.training
    mllm.model.eval()
    # Questions of similar length, so that a batch holds little padding.
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for first in tqdm(range(0, len(order), _BATCH), desc="asking the base", unit="batch", delay=1):
        rows = order[first : first + _BATCH]
        answers = decode_text(mllm.model, [prompts[row] for row in rows], _SAMPLING, stops)
        for row, answer in zip(rows, answers, strict=True):
            text = processor.decode_text(answer).strip()
            if text:
                question = {"role": "user", "content": questions[row]}
                yield {"messages": [question, _message(text, len(answer) < _SAMPLING.max_new_tokens)]}
    mllm.model.train(training)


def _message(text: str, ended: bool) -> dict[str, Any]:
    """Return an answer as a message. Of one that was cut off, the last word is not learned, and so no end of the turn."""
    learned, space, rest = text.rpartition(" ")
    if ended or not learned:
        return {"role": "assistant", "content": text}
    parts = [{"type": "text", "text": learned}, {"type": "text", "text": space + rest, "loss": False}]
    return {"role": "assistant", "content": parts}
