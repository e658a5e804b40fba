"""LarpMllmForCausalLM as a model of transformers: arguments of forward, ids out of range, outputs of generate, resizing."""

import json

from larp_mllm.model.configuration import LarpMllmConfig
from larp_mllm.model.modeling import LarpMllmForCausalLM
from tests.larp_mllm.families import FAMILIES

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def eager():
    """A tiny model that returns attentions; ids 0 to 98 are text, 99 and 100 controls, 101 to 116 codes."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(FAMILIES["llama2"](), attn_implementation="eager")
    return LarpMllmForCausalLM.from_base(base, 0, torch.randn(16, 4), 4).eval()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda model: model.resize_token_embeddings(128),
            "cannot be resized .it has 117 rows.*train with it, or .* export",
        ),
        (lambda model: model.resize_token_embeddings(pad_to_multiple_of=64), "cannot be resized"),
        (
            lambda model: model.set_input_embeddings(torch.nn.Embedding(128, 32)),
            r"embedding .* is \(99, 32\) and keeps",
        ),
        (lambda model: model.set_output_embeddings(torch.nn.Linear(32, 128)), r"head .* is \(99, 32\) and keeps"),
    ],
)
def test_the_base_cannot_be_resized(eager, change, message):
    before = {name: value.clone() for name, value in eager.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        change(eager)
    after = eager.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert eager.config.base_rows == 99


def test_embedding_and_head_can_be_read_and_replaced(eager):
    embedding, head = eager.base.get_input_embeddings(), eager.base.get_output_embeddings()
    assert eager.resize_token_embeddings() is eager.resize_token_embeddings(117) is eager.get_input_embeddings()
    new = torch.nn.Embedding(99, 32), torch.nn.Linear(32, 99, bias=False)
    eager.set_input_embeddings(new[0])
    eager.set_output_embeddings(new[1])
    found = eager.base.get_input_embeddings(), eager.base.get_output_embeddings()
    assert torch.equal(eager.get_input_embeddings().weight[:99], new[0].weight)
    assert torch.equal(eager.get_output_embeddings().weight[:99, :32], new[1].weight)
    eager.set_input_embeddings(embedding)
    eager.set_output_embeddings(head)
    assert found == new


@pytest.mark.parametrize("wrong", [-1, -101, 117, 10**9])
def test_ids_and_labels_out_of_range_are_refused(eager, wrong):
    good = torch.tensor([[5, 99, 116, 100]])
    bad = good.clone()
    bad[0, 2] = wrong
    assert torch.isfinite(eager(good, labels=good).loss)
    with pytest.raises(ValueError, match=rf"input_ids holds {wrong}, but the ids of this model are 0 to 116: take"):
        eager(bad)
    with pytest.raises(ValueError, match=rf"labels holds {wrong}, .* 0 to 116 \(and -100 in labels: not a target\)"):
        eager(good, labels=bad)
    with pytest.raises(ValueError, match=rf"labels holds {wrong}"):
        eager(inputs_embeds=eager.get_input_embeddings()(good), labels=bad)


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({}, ValueError, "either input_ids"),
        (
            {"input_ids": torch.zeros(1, 2).long(), "inputs_embeds": torch.zeros(1, 2, 32)},
            ValueError,
            "either input_ids",
        ),
        (
            {"input_ids": torch.zeros(1, 2).long(), "labels": torch.zeros(1, 3).long()},
            ValueError,
            r"labels must be \(1, 2\) like the ids, got \(1, 3\)",
        ),
        ({"input_ids": torch.zeros(1, 2).long(), "foo": 3}, TypeError, "unexpected keyword argument 'foo'"),
    ],
)
def test_contradictory_arguments_are_refused(eager, options, kind, message):
    with pytest.raises(kind, match=message):
        eager(**options)


def test_forward_returns_what_models_of_transformers_return(eager):
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    plain, theirs = eager(ids), eager.base(ids, output_hidden_states=True, output_attentions=True)
    assert plain.hidden_states is None and plain.attentions is None
    for labels in (None, ids):
        ours = eager(ids, labels=labels, output_hidden_states=True, output_attentions=True)
        torch.testing.assert_close(ours.hidden_states, theirs.hidden_states)
        torch.testing.assert_close(ours.attentions, theirs.attentions)
    eager.config.output_hidden_states = True
    assert len(eager(ids).hidden_states) == 3 and eager(ids, output_hidden_states=False).hidden_states is None
    eager.config.output_hidden_states = False
    assert torch.equal(eager(ids, return_dict=False)[0], plain.logits)
    assert torch.equal(eager(ids, labels=ids, return_dict=False)[0], eager(ids, labels=ids).loss)
    assert torch.equal(
        eager(ids, is_causal=True, num_items_in_batch=4).logits, plain.logits
    )  # options that Trainer and attention pass


@pytest.mark.parametrize(
    "keep, rows, places",
    [
        (0, [[0], [1]], [[0, 1, 2, 3]]),
        (1, [[0], [1]], [[3]]),
        (3, [[0], [1]], [[1, 2, 3]]),
        (torch.tensor([0, 2]), [[0], [1]], [[0, 2]]),
        (torch.tensor([[0, 2], [3, 1]]), [[0], [1]], [[0, 2], [3, 1]]),
        (torch.eye(4)[:2].bool(), [0, 1], [0, 1]),
    ],
    ids=str,
)
def test_logits_to_keep_selects_positions(eager, keep, rows, places):
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    ours, theirs = eager(ids, logits_to_keep=keep).logits, eager.base(ids).logits[rows, places]
    assert ours.shape == (*theirs.shape[:-1], 117)
    torch.testing.assert_close(ours[..., :99], theirs)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_returns_scores_and_states_of_all_ids(eager, beams):
    ids = torch.tensor([[5, 6, 7], [9, 99, 116]])
    kinds = dict.fromkeys(("output_scores", "output_logits", "output_hidden_states", "output_attentions"), True)
    settings = dict(do_sample=False, max_new_tokens=4, num_beams=beams, eos_token_id=None, pad_token_id=0)
    # Codes at every second step: their scores follow those of the base's ids.
    banned = list(range(101)), list(range(101, 117))
    rule = [lambda so_far, scores: scores.index_fill(1, torch.tensor(banned[so_far.shape[1] % 2]), -torch.inf)]
    out = eager.generate(
        ids, attention_mask=ids * 0 + 1, return_dict_in_generate=True, logits_processor=rule, **kinds, **settings
    )
    assert len(out.scores) == len(out.hidden_states) == len(out.attentions) == 4
    assert out.scores[0].shape == (2 * beams, 117) and len(out.hidden_states[0]) == 3
    scores = eager.compute_transition_scores(
        out.sequences, out.scores, out.get("beam_indices"), normalize_logits=beams == 1
    )
    if beams == 1:
        generated = out.sequences[:, 3:]
        torch.testing.assert_close(
            scores, torch.stack(out.scores, 1).log_softmax(-1).gather(2, generated[..., None])[..., 0]
        )
    else:
        torch.testing.assert_close(scores.mean(-1), out.sequences_scores)


def test_a_config_has_the_sizes_of_the_whole_model(eager, tmp_path):
    config = eager.config
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (117, 32, 2)
    assert config.get_text_config().vocab_size == 117 and config.base_config.vocab_size == 99
    assert config.base_config.to_dict() == eager.base.config.to_dict()
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert not {"vocab_size", "hidden_size", "num_hidden_layers"} & saved.keys()
    assert LarpMllmConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert LarpMllmConfig().vocab_size == 0
    with pytest.raises(AttributeError):
        config.vocab_size = 5
