"""The base's own answers to plain questions and its own prose, mixed into the training so that it keeps what it was.

A model that is trained on requests for videos alone soon answers everything with a video, and forgets prose. What it says
itself is the text that changes it least, and needs no data: in expectation, training on its samples brings it back to itself.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from larp.engine.signals import check_stop
from larp.files import write_text
from larp_mllm.data.records import RecordSet, open_records
from larp_mllm.generation.decode import decode_text
from larp_mllm.generation.sampling import TextSampling
from larp_mllm.pipeline import Mllm
from larp_mllm.processing.chat import stop_ids
from larp_mllm.processing.token_sequence import PLACEHOLDER
from larp_mllm.processing.tokenizer_checks import text_tokenizer_hash

import torch
from tqdm import tqdm

QUESTIONS, OPENINGS = (Path(__file__).parents[1] / "data" / name for name in ("questions.txt", "openings.txt"))
"""Questions without a wish for a video, one a line, many about what videos show; and first words of prose."""
_ANSWER = TextSampling(max_new_tokens=64)
_PROSE = TextSampling(temperature=1.0, max_new_tokens=128)
_PIECES = 2  # of prose for each opening
_BATCH = 16
_BATCH_OF_GPU = 128
_HASHED = 1024  # values of each tensor: a training changes all of them
_SENTENCE = re.compile(r".*[.!?][\"')\]]*(?=\s)", re.DOTALL)


def own_answers(mllm: Mllm, folder: Path, sequence_length: int | None = None) -> RecordSet | None:
    """Read the base's answers, after asking it if their file is missing; None for a base without a chat template.

    Args:
        folder: for own-answers-HASH.jsonl, one file for each base.
        sequence_length: most ids of a packed row.

    Raises ValueError for a file that does not hold records, and for answers of more ids than `sequence_length`.
    """
    if not mllm.processor.tokenizer.chat_template:
        return None
    path = folder / f"own-answers-{_base_hash(mllm)}.jsonl"
    if not path.exists():
        questions, openings = (file.read_text(encoding="utf-8").splitlines() for file in (QUESTIONS, OPENINGS))
        training = mllm.model.training
        mllm.model.eval()
        records = [*_answers(mllm, questions), *_prose(mllm, openings)]
        mllm.model.train(training)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    records = open_records(path, mllm.processor, cache=folder, positions=mllm.model.config.positions)
    if sequence_length is not None and records.longest > sequence_length:
        raise ValueError(
            f"sequence_length is {sequence_length}, but the longest of the base's own answers ({path}) has {records.longest} ids, "
            f"and nothing is truncated: raise it to {records.longest} or more, or leave them out with --tasks.own-answers 0"
        )
    return records


def _base_hash(mllm: Mllm) -> str:
    """Return what tells bases apart that answer differently: a hash of template, vocabulary and some values of each weight."""
    tokenizer = mllm.processor.tokenizer
    total = hashlib.sha256(f"{tokenizer.chat_template}{text_tokenizer_hash(tokenizer)}".encode())
    for tensor in mllm.model.base.state_dict().values():
        total.update(tensor.flatten()[:_HASHED].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:12]


def _answers(mllm: Mllm, questions: list[str]) -> Iterator[dict[str, Any]]:
    """Yield each question with the base's most probable answer as a chat."""
    prompts = [mllm.chat_prompt([{"role": "user", "content": question}]) for question in questions]
    stops = stop_ids(mllm.processor.tokenizer)
    for row, answer in _decoded(mllm, prompts, _ANSWER, stops, "asking the base"):
        if text := mllm.processor.decode_text(answer).strip():
            question = {"role": "user", "content": questions[row]}
            yield {"messages": [question, _message(text, len(answer) < _ANSWER.max_new_tokens)]}


def _prose(mllm: Mllm, openings: list[str]) -> Iterator[dict[str, Any]]:
    """Yield whole sentences that the base writes after each opening, sampled at temperature 1."""
    processor, layout = mllm.processor, mllm.processor.layout
    begin, stops = ([] if id is None else [id] for id in (layout.bos, layout.eos))
    first = [processor.encode_text(opening) for opening in openings] * _PIECES
    for row, written in _decoded(mllm, [begin + ids for ids in first], _PROSE, stops, "prose of the base"):
        # A cut piece ends with its last whole sentence, since the end of the text is learned.
        sentences = _SENTENCE.match(processor.decode_text(first[row] + written) + "\n")
        if sentences and PLACEHOLDER not in sentences[0]:
            yield {"text": sentences[0]}


def _decoded(
    mllm: Mllm, prompts: list[list[int]], sampling: TextSampling, stops: list[int], title: str
) -> Iterator[tuple[int, list[int]]]:
    """Yield the number of each prompt with what follows it, prompts of similar length in one batch."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    batch = _BATCH if mllm.model.device.type == "cpu" else _BATCH_OF_GPU
    for first in tqdm(range(0, len(order), batch), desc=title, unit="batch", delay=1):
        check_stop()
        rows = order[first : first + batch]
        # Another seed for each batch: a row's random numbers depend on the seed and its place in the batch.
        texts = decode_text(mllm.model, [prompts[row] for row in rows], replace(sampling, seed=first), stops)
        yield from zip(rows, texts, strict=True)


def _message(text: str, ended: bool) -> dict[str, Any]:
    """Return an answer as a message. Of one that was cut off, the last word is not learned, and so no end of the turn."""
    learned, space, rest = text.rpartition(" ")
    if ended or not learned:
        return {"role": "assistant", "content": text}
    parts = [{"type": "text", "text": learned}, {"type": "text", "text": space + rest, "loss": False}]
    return {"role": "assistant", "content": parts}
