"""What is counted of a pass: nats, hits and targets, of text and of video apart; and the figures on held-out videos."""

import math
from collections.abc import Callable, Collection, Sequence

from larp.engine.distributed import Ranks, reduce_sum
from larp_mllm.data.collate import collate
from larp_mllm.data.corpus import Corpus
from larp_mllm.data.dataset import CaptionedVideos, evaluated_tasks, evaluation_rows
from larp_mllm.model.vocabulary import IGNORE
from larp_mllm.processing.sequence import TokenSequence

import torch
from torch import Tensor

TALLY = ("video_nll", "video_correct", "video_count", "text_nll", "text_correct", "text_count")


def tally(out) -> Tensor:
    """The sums of a LarpMllmOutput that TALLY names, float64 (6,), on its device: who reads them waits for it."""
    return torch.stack([out[name].double() for name in TALLY])


def rates(sums: Tensor) -> dict[str, float]:
    """Sums named in TALLY -> bits per video token, nats per text token, and how often the likeliest was right.

    What has no targets has no figures.
    """
    total = dict(zip(TALLY, sums.tolist(), strict=True))
    found = {}
    if videos := total["video_count"]:
        found["video_bits"] = total["video_nll"] / videos / math.log(2)
        found["video_accuracy"] = total["video_correct"] / videos
    if texts := total["text_count"]:
        found["text_nll"] = total["text_nll"] / texts
        found["text_accuracy"] = total["text_correct"] / texts
    return found


def micro_batches(rows: Sequence[list[TokenSequence]], parts: int, ranks: Ranks) -> list[dict[str, Tensor]]:
    """This rank's `parts` micro batches of the rows of a global batch, whose number is a multiple of parts * ranks.

    All of all ranks have one shape: the model computes its head in chunks of the batch, and where parameters are sharded every
    rank must compute as many.
    """
    size = len(rows) // (parts * ranks.world_size)
    width = max(1, *(sum(len(sequence.ids) for sequence in row) for row in rows))
    firsts = [(part * ranks.world_size + ranks.rank) * size for part in range(parts)]
    batches = [collate(rows[first : first + size], width) for first in firsts]
    return [{name: value.to(ranks.device) for name, value in batch.items()} for batch in batches]


@torch.no_grad()
def score(forward: Callable, sequences: Sequence[TokenSequence], size: int, ranks: Ranks) -> dict[str, float]:
    """`rates` over sequences, `size` at a time on each rank. forward: the engine or the model. Collective."""
    sums = torch.zeros(len(TALLY), dtype=torch.float64, device=ranks.device)
    each = size * ranks.world_size
    for first in range(0, len(sequences), each):
        # All ranks pass the same number of times, as sharded parameters need; the last ones may have nothing left.
        rows = [[sequence] for sequence in sequences[first : first + each]]
        (batch,) = micro_batches(rows + [[] for _ in range(each - len(rows))], 1, ranks)
        sums += tally(forward(**batch))
    return rates(reduce_sum(sums))


def score_videos(
    forward: Callable, data: CaptionedVideos, tasks: Sequence[str], most: int, size: int, ranks: Ranks
) -> dict[str, float]:
    """Figures on at most `most` held-out videos, each in its first phrasing. Collective.

    video_bits and video_accuracy: the codes of a video for its caption (text_to_video). text_nll and text_accuracy: the
    caption of a video (video_to_text). chat_bits, chat_accuracy: its codes as the answer to a wish for it in a chat.
    continuation_bits, continuation_accuracy: its codes for its first frames, without a caption. tasks: which of these four.
    """
    rows = evaluation_rows(len(data), most)
    found: dict[str, float] = {"videos": len(rows)}
    for task in tasks:
        sequences = [data.evaluation_sequence(row, task) for row in rows]
        if task != "video_to_text":
            # In the others the only text target is the start of the video.
            sequences = [_codes_only(sequence, data) for sequence in sequences]
        figures = score(forward, sequences, size, ranks)
        if task in ("chat", "continuation"):
            figures = {name.replace("video_", f"{task}_"): value for name, value in figures.items()}
        found |= figures
    return found


def score_corpus(
    forward: Callable, corpus: Corpus, trained: Collection[str], most: int, size: int, ranks: Ranks
) -> dict[str, float]:
    """`score_videos` on the held-out videos, of the tasks that were trained; and of held-out records, named records_...

    At most `most` of each, spread evenly; "records" says how many of them. A model that was trained on records alone is judged on text-to-video and video-to-text. Collective.
    """
    found: dict[str, float] = {}
    if (held_out := corpus.held_out_videos) is not None:
        found |= score_videos(forward, held_out, evaluated_tasks(held_out, trained), most, size, ranks)
    if corpus.held_out_records:
        records = [corpus.held_out_records[row] for row in evaluation_rows(len(corpus.held_out_records), most)]
        found["records"] = len(records)
        found |= {f"records_{name}": value for name, value in score(forward, records, size, ranks).items()}
    return found


def _codes_only(sequence: TokenSequence, data: CaptionedVideos) -> TokenSequence:
    is_code = data.layout.vocabulary.is_code(sequence.labels)
    return TokenSequence(sequence.ids, sequence.labels.masked_fill(~is_code, IGNORE))
