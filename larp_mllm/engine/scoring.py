"""Metrics of text targets and video targets: summed over forward passes, averaged, and measured on held-out data."""

import math
from collections.abc import Callable, Collection, Sequence

from larp.engine.distributed import Ranks, reduce_sum
from larp_mllm.data.collate import collate
from larp_mllm.data.corpus import Corpus
from larp_mllm.data.dataset import CaptionedVideos, evaluated_tasks, evaluation_rows
from larp_mllm.model.vocabulary import IGNORE
from larp_mllm.processing.token_sequence import TokenSequence

import torch
from torch import Tensor

METRIC_SUMS = ("video_nll", "video_correct", "video_count", "text_nll", "text_correct", "text_count")


def metric_sums(out) -> Tensor:
    """Return the fields METRIC_SUMS of a LarpMllmOutput, float64 (6,), on its device, so that no pass waits for a copy."""
    return torch.stack([out[name].double() for name in METRIC_SUMS])


def mean_metrics(sums: Tensor) -> dict[str, float]:
    """Return video_bits (per token), text_nll (nats per token), video_accuracy and text_accuracy of METRIC_SUMS.

    A kind of token without targets is left out.
    """
    total = dict(zip(METRIC_SUMS, sums.tolist(), strict=True))
    found = {}
    if videos := total["video_count"]:
        found["video_bits"] = total["video_nll"] / videos / math.log(2)
        found["video_accuracy"] = total["video_correct"] / videos
    if texts := total["text_count"]:
        found["text_nll"] = total["text_nll"] / texts
        found["text_accuracy"] = total["text_correct"] / texts
    return found


def micro_batches(rows: Sequence[list[TokenSequence]], parts: int, ranks: Ranks) -> list[dict[str, Tensor]]:
    """Return this rank's `parts` micro batches of a global batch, whose rows are a multiple of parts * ranks.

    All micro batches of all ranks have one shape: with sharded parameters every rank must compute equally many chunks of
    the head.
    """
    size = len(rows) // (parts * ranks.world_size)
    width = max(1, *(sum(len(sequence.ids) for sequence in row) for row in rows))
    firsts = [(part * ranks.world_size + ranks.rank) * size for part in range(parts)]
    batches = [collate(rows[first : first + size], width) for first in firsts]
    return [{name: value.to(ranks.device) for name, value in batch.items()} for batch in batches]


@torch.no_grad()
def score(forward: Callable, sequences: Sequence[TokenSequence], size: int, ranks: Ranks) -> dict[str, float]:
    """Return `mean_metrics` of sequences, `size` in one pass of each rank. Collective.

    forward: the engine or the model.
    """
    sums = torch.zeros(len(METRIC_SUMS), dtype=torch.float64, device=ranks.device)
    each = size * ranks.world_size
    for first in range(0, len(sequences), each):
        # With sharded parameters all ranks need equally many passes: the last ones are filled with empty rows.
        rows = [[sequence] for sequence in sequences[first : first + each]]
        (batch,) = micro_batches(rows + [[] for _ in range(each - len(rows))], 1, ranks)
        sums += metric_sums(forward(**batch))
    return mean_metrics(reduce_sum(sums))


def score_videos(
    forward: Callable, data: CaptionedVideos, tasks: Sequence[str], most: int, size: int, ranks: Ranks
) -> dict[str, float]:
    """Return metrics of at most `most` held-out videos, evenly spaced, each in its first phrasing. Collective.

    Args:
        tasks: text_to_video gives video_bits and video_accuracy, of codes after a caption; video_to_text gives text_nll and
            text_accuracy, of captions after a video; chat gives chat_bits and chat_accuracy, of codes after a request;
            continuation gives continuation_bits and continuation_accuracy, of codes after given frames without a caption.
        size: sequences in one pass of each rank.

    "videos" is the number of videos.
    """
    rows = evaluation_rows(len(data), most)
    found: dict[str, float] = {"videos": len(rows)}
    for task in tasks:
        sequences = [data.evaluation_sequence(row, task) for row in rows]
        if task != "video_to_text":
            # The only text target of the other tasks is video_start.
            sequences = [_codes_only(sequence, data) for sequence in sequences]
        figures = score(forward, sequences, size, ranks)
        if task in ("chat", "continuation"):
            figures = {name.replace("video_", f"{task}_"): value for name, value in figures.items()}
        found |= figures
    return found


def score_corpus(
    forward: Callable, corpus: Corpus, trained: Collection[str], most: int, size: int, ranks: Ranks
) -> dict[str, float]:
    """Return `score_videos` of the held-out videos, for `evaluated_tasks`, and metrics records_... of held-out records.

    At most `most` of each, evenly spaced; "records" is the number of records. Collective.
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
