"""Metrics of held-out data."""

from larp.engine.distributed import Ranks
from larp_mllm.data.corpus import Corpus
from larp_mllm.engine.scoring import score_corpus
from larp_mllm.processing.token_sequence import TokenSequence

import torch


def test_an_evenly_spaced_part_of_many_held_out_records_is_scored(qwen):
    records = [TokenSequence(torch.tensor([5, number]), torch.tensor([-100, number])) for number in range(10, 31)]
    corpus = Corpus(None, None, None, records, None, [], "")
    seen = []

    def forward(**batch):
        seen.extend(batch["input_ids"][:, 1].tolist())
        return qwen.model(**batch)

    found = score_corpus(forward, corpus, ["interleaved"], 3, 2, Ranks())
    assert found["records"] == 3 and found["records_text_nll"] > 0
    assert [number for number in seen if number] == [10, 20, 30]
