"""Figures of a language model with video vocabulary: bits per code, and classes named in captions.

Shapes: n clips, N codes of a clip, K codebook size, C classes.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from larp.data.datasets import humanize
from larp.metrics.intervals import clustered_share
from larp_mllm.data.phrases import PHRASINGS
from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.processing.token_sequence import check_length

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm


@torch.inference_mode()
def code_bits(
    model: LarpMllmForCausalLM, prompts: Sequence[Sequence[int]], codes: Tensor, batch_size: int = 32
) -> Tensor:
    """Return the bits per code of clips after their prompts, teacher-forced: float64 (n,) on the CPU.

    Args:
        prompts: n lists of ids that end in video_start, such as `Layout.prompt` and `Layout.continuation` give.
        codes: (n, N) in [0, K).
        batch_size: clips in one pass; changes only rounding.

    The softmax is over the K code logits: generation allows no other id there. Raises ValueError if the numbers of prompts
    and clips differ, or if the ids exceed the positions of the base model.
    """
    if len(prompts) != len(codes):
        raise ValueError(f"{len(prompts)} prompts for the codes of {len(codes)} clips; need one for each")
    count, bits = codes.shape[1], torch.empty(len(codes), dtype=torch.float64)
    longest = max(map(len, prompts), default=0)
    check_length(longest + count, model.config.positions, "scoring: the prompt and the video")
    # Sorted by length, a batch holds little padding.
    order = sorted(range(len(codes)), key=lambda row: len(prompts[row]))
    for first in tqdm(range(0, len(order), batch_size), desc="scoring codes", unit="batch", delay=2, leave=False):
        rows = order[first : first + batch_size]
        lengths = torch.tensor([len(prompts[row]) for row in rows])
        ids = torch.zeros(len(rows), int(lengths.max()) + count, dtype=torch.int64)
        for place, row in enumerate(rows):
            row_ids = [*prompts[row], *model.vocabulary.code_to_id(codes[row].long()).tolist()]
            ids[place, : len(row_ids)] = torch.tensor(row_ids)
        # Causal attention does not see padding on the right.
        states = model.run_base(ids.to(model.device), use_cache=False).last_hidden_state
        places = (lengths[:, None] - 1 + torch.arange(count)).to(states.device)
        logits = model.code_logits(states.take_along_dim(places[..., None], dim=1)).float()
        wanted = codes[rows].long().to(logits.device)
        nats = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").double()
        bits[rows] = (nats.mean(dim=1) / math.log(2)).cpu()
    return bits


def frequency_bits(train: Tensor, held_out: Tensor, codebook_size: int) -> dict[str, float]:
    """Return the bits per code of a model that knows only code frequencies, for codes (n, N) and (m, N) in [0, K).

    entropy: of the frequencies in `train`. held_out: cross-entropy of the held-out codes, with one added to each count, so
    that it is finite for codes that `train` lacks.
    """
    counts = torch.bincount(train.long().flatten(), minlength=codebook_size).double()
    seen = counts[counts > 0] / counts.sum()
    cost = -((counts + 1) / (counts.sum() + codebook_size)).log2()
    return {"entropy": -(seen * seen.log2()).sum().item(), "held_out": cost[held_out.long()].mean().item()}


def class_in_caption(caption: str, classes: Sequence[str], phrasings: Sequence[str] = PHRASINGS) -> int | None:
    """Return the number of the class that a caption names, None if it names none or is ambiguous.

    classes: names as data sets spell them ("PlayingPiano"). A caption that equals a phrasing of one class names it. Otherwise
    it names the class whose words all occur in it, in any order; of several, the one with the most words ("walking with a
    dog" before "walking"). Case, punctuation and white space are ignored.
    """
    words = _words(caption)
    names = [humanize(name) for name in classes]
    exact = [number for number, name in enumerate(names) if words in [_words(p.format(name)) for p in phrasings]]
    if len(exact) == 1:
        return exact[0]
    found = {number: len(_words(name)) for number, name in enumerate(names) if set(_words(name)) <= set(words)}
    most = [number for number, count in found.items() if count == max(found.values())]
    return most[0] if len(most) == 1 else None


def caption_figures(
    captions: Sequence[str], wanted: Sequence[int], classes: Sequence[str], groups: Tensor
) -> dict[str, Any]:
    """Return how often captions (n,) name the class of their video, `wanted` (n,) in [0, C); naming none counts as wrong.

    groups: the source of each video, int64 (n,), see `larp.metrics.intervals`.

    Keys: accuracy, interval_95 (see `clustered_share`), num_sources, chance (1 / C), most_frequent (the accuracy of always naming the most frequent
    class), num_clips, unread (captions that name no class), by_class (name -> accuracy) and confusion: for each wanted class
    the counts of the named classes in the order of `classes`, and last of unread captions. Raises ValueError if the lengths
    differ or there is no caption.
    """
    if len(captions) != len(wanted) or not len(wanted):
        raise ValueError(f"{len(captions)} captions for {len(wanted)} videos; need one for each, at least 1")
    named = [class_in_caption(caption, classes) for caption in captions]
    confusion = [[0] * (len(classes) + 1) for _ in classes]
    for found, label in zip(named, wanted, strict=True):
        confusion[label][len(classes) if found is None else found] += 1
    sums = [sum(row) for row in confusion]
    right = torch.tensor([found == label for found, label in zip(named, wanted, strict=True)])
    return {
        "accuracy": right.double().mean().item(),
        "interval_95": clustered_share(right, groups),
        "num_sources": len(groups.unique()),
        "chance": 1 / len(classes),
        "most_frequent": max(sums) / len(wanted),
        "num_clips": len(wanted),
        "unread": sum(row[-1] for row in confusion),
        "by_class": {
            name: confusion[number][number] / sums[number] for number, name in enumerate(classes) if sums[number]
        },
        "confusion": confusion,
    }


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
