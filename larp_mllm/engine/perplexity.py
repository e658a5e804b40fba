"""Perplexity of plain text: before and after training it shows how much text ability was lost.

Shapes: S ids of a piece, n scored positions, H hidden width, V rows of the base model's head.
"""

import math
from collections.abc import Sequence

from larp_mllm.data.collate import collate
from larp_mllm.data.dataset import evaluation_rows
from larp_mllm.data.text_data import TextSet
from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.model.vocabulary import IGNORE
from larp_mllm.processing.token_sequence import TokenSequence

import torch
from torch import Tensor

_BATCH = 8  # pieces in one pass
_CHUNK = 256  # positions whose logits are in memory at a time


def text_perplexity(model, processor, documents: Sequence[str], length: int) -> dict[str, float]:
    """Score documents, cut into pieces of at most `length` ids.

    Args:
        model: a LarpMllmForCausalLM, or a plain causal LM for comparison.
        processor: its encode_text and layout are used.

    Returns pieces and tokens (numbers scored), nll (nats per token) and perplexity. Both are over text ids alone and so
    comparable with the base's. For a LarpMllmForCausalLM also video_start, its mean probability where text continues. Raises ValueError for documents without a token to score.
    """
    pieces = TextSet(list(documents), processor.encode_text, processor.layout, length)
    return score_text(model, [pieces[index] for index in range(len(pieces))])


@torch.no_grad()
def score_text(model, pieces: Sequence[TokenSequence], most: int | None = None) -> dict[str, float]:
    """Return `text_perplexity` of encoded pieces: all of them, or at most `most`, evenly spaced.

    Raises ValueError also for a text id that the base has no row for.
    """
    with_video = isinstance(model, LarpMllmForCausalLM)
    base = model.base if with_video else model
    selected = [pieces[row] for row in evaluation_rows(len(pieces), len(pieces) if most is None else most)]
    _check_rows(base, selected)
    # Sorted by length, a batch holds little padding.
    selected.sort(key=lambda piece: len(piece.ids))
    sums = torch.zeros(3, dtype=torch.float64)  # nll, positions, video_start
    training = model.training
    model.eval()
    try:
        for number in range(0, len(selected), _BATCH):
            # Causal attention does not see padding on the right.
            batch = collate([[piece] for piece in selected[number : number + _BATCH]])
            labels = batch["labels"][:, 1:].to(model.device)
            scored = labels != IGNORE
            hidden = base.base_model(input_ids=batch["input_ids"].to(model.device), use_cache=False).last_hidden_state
            hidden, targets = hidden[:, :-1][scored], labels[scored]
            for first in range(0, len(targets), _CHUNK):
                part = slice(first, first + _CHUNK)
                sums += _score(model, base, hidden[part], targets[part], with_video)
    finally:
        model.train(training)
    count = int(sums[1])
    if not count:
        raise ValueError("the held-out text has no token to score: give a longer one with --eval-text txt:FILE")
    nll = sums[0].item() / count
    # exp overflows a float above 709.
    scores = {"pieces": len(selected), "tokens": count, "nll": nll, "perplexity": math.exp(min(nll, 700.0))}
    if with_video:
        scores["video_start"] = sums[2].item() / count
    return scores


def _check_rows(base, pieces: Sequence[TokenSequence]) -> None:
    rows = base.get_input_embeddings().num_embeddings
    largest = max((int(piece.ids.max()) for piece in pieces if len(piece.ids)), default=0)
    if largest >= rows:
        raise ValueError(
            f"the held-out text holds id {largest} of the text tokenizer, but the base model has {rows} rows: take the tokenizer "
            "that it was trained with, resize its embedding once and save it, or give other text with --eval-text"
        )


def _score(model, base, hidden: Tensor, targets: Tensor, with_video: bool) -> Tensor:
    """Return float64 (3,): nll, n and the probability of video_start, each summed over the n positions.

    hidden: (n, H); targets: (n,).
    """
    text = base.get_output_embeddings()(hidden).float()
    nll = torch.nn.functional.cross_entropy(text, targets, reduction="sum")
    start = nll.new_zeros(())
    if with_video:
        logits = (hidden @ model.adapter.control_rows()[0]).float()
        start = (logits - torch.logaddexp(text.logsumexp(-1), logits)).exp().sum()
    return torch.stack([nll.double(), nll.new_tensor(len(targets)).double(), start.double()]).cpu()
