"""TokenAdapter: initial values, what the rows are computed from, gradients."""

from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.model.token_adapter import CodebookRows, TokenAdapter, residual_rank
from tests.larp_mllm.families import FAMILIES

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

HIDDEN, K, WIDTH = 64, 256, 8


def initialized(
    kind: str = "codebook", scale: float = 0.02, head_scale: float = 0.05, mean: float = 0.0
) -> TokenAdapter:
    """An adapter for a base whose rows have these standard deviations and this mean."""
    torch.manual_seed(0)
    adapter = TokenAdapter(K, WIDTH, HIDDEN, kind)
    codebook = F.normalize(torch.randn(K, WIDTH), dim=-1)
    adapter.initialize(codebook, mean + scale * torch.randn(500, HIDDEN), mean + head_scale * torch.randn(500, HIDDEN))
    return adapter


def centred_norm(rows: torch.Tensor) -> float:
    return (rows - rows.mean(0)).norm(dim=-1).mean().item()


@pytest.mark.parametrize("kind", ["codebook", "free"])
@pytest.mark.parametrize("scale, head_scale", [(0.02, 0.02), (1.0, 0.02), (0.006, 3.0)])
def test_rows_are_initialised_to_the_norm_of_the_base_models(kind, scale, head_scale):
    adapter = initialized(kind, scale, head_scale)
    for rows, of_base in ((adapter.input_rows()[2:], scale), (adapter.code_rows(), head_scale)):
        assert centred_norm(rows) == pytest.approx(of_base * HIDDEN**0.5, rel=0.05)
    assert adapter.input_rows()[2:].mean(0).norm() < 0.15 * scale * HIDDEN**0.5
    for rows, of_base in ((adapter.input_rows()[:2], scale), (adapter.control_rows(), head_scale)):
        assert rows.norm(dim=-1).mean().item() == pytest.approx(of_base * HIDDEN**0.5, rel=0.3)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_initialised_to_the_norm_of_every_family(family):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(FAMILIES[family]())
    with torch.no_grad():
        base.get_output_embeddings().weight.mul_(1.5)
    adapter = LarpMllmForCausalLM.from_base(base, 0, torch.randn(K, WIDTH), 4).adapter
    for rows, table in ((adapter.input_rows()[2:], base.get_input_embeddings()), (adapter.code_rows(), base.lm_head)):
        assert centred_norm(rows) == pytest.approx(table.weight.norm(dim=-1).mean().item(), rel=0.03)


@pytest.mark.parametrize("kind", ["codebook", "free"])
def test_codes_begin_nearly_equally_probable_for_a_base_with_large_hidden_states(kind):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(FAMILIES["qwen2-tied"]())
    with torch.no_grad():
        base.base_model.norm.weight.fill_(30.0)
        base.get_output_embeddings().weight.mul_(20)
    model = LarpMllmForCausalLM.from_base(base, 0, torch.randn(K, WIDTH), 4, kind)
    hidden = base.base_model(input_ids=torch.arange(40)[None]).last_hidden_state
    spread = model.code_logits(hidden).std(-1).mean().item()
    assert 0.3 < spread < 0.6


def test_codebook_rows_are_the_mlp_of_the_codebook_plus_a_residual_of_zero():
    adapter = initialized()
    assert not adapter.code_input.residual.weight.any() and not adapter.code_output.residual.weight.any()
    with torch.no_grad():
        adapter.code_input.residual.weight[3] = 1.0
    mlp = adapter.code_input.mlp(adapter.codebook)
    assert torch.equal(adapter.input_rows()[2 + 3], mlp[3] + 1)
    assert torch.equal(adapter.input_rows()[2 + 4], mlp[4])


def test_the_residual_of_a_small_rank_is_a_product_that_begins_with_zero():
    torch.manual_seed(0)
    adapter = TokenAdapter(K, WIDTH, HIDDEN, "codebook", rank=4)
    adapter.initialize(F.normalize(torch.randn(K, WIDTH), dim=-1), torch.randn(5, HIDDEN), torch.randn(5, HIDDEN))
    rows, table = adapter.code_input, adapter.code_input.residual.weight
    assert table.shape == (K, 4) and not table.any() and residual_rank("codebook", HIDDEN) > 4
    (adapter.input_rows().square().sum() + adapter.code_rows().square().sum()).backward()
    assert table.grad.any() and adapter.code_output.residual.weight.grad.any()
    with torch.no_grad():
        table[3] = 1.0
    mlp = rows.mlp(adapter.codebook)
    torch.testing.assert_close(adapter.input_rows()[2 + 3], mlp[3] + rows.expand.weight.sum(1))
    assert torch.equal(adapter.input_rows()[2 + 4], mlp[4])
    assert residual_rank("free", HIDDEN) == residual_rank("codebook", 16) == 0, "a table, where a product saves nothing"


def test_head_rows_have_their_own_projection_without_an_offset():
    adapter = initialized()
    assert not torch.allclose(adapter.code_output.mlp[0].weight, adapter.code_input.mlp[0].weight)
    assert adapter.code_input.mlp[2].bias is not None and adapter.code_output.mlp[2].bias is None


def test_similar_codes_have_similar_initial_rows_and_all_differ():
    adapter = initialized()
    codes = torch.cdist(adapter.codebook, adapter.codebook)
    for rows in (adapter.input_rows()[2:], adapter.code_rows()):
        distances = torch.cdist(rows, rows)
        pairs = ~torch.eye(K, dtype=torch.bool)
        assert torch.corrcoef(torch.stack([codes[pairs], distances[pairs]]))[0, 1] > 0.8
        assert distances[pairs].min() > 0


def test_free_rows_are_initialised_around_the_mean_row_of_the_base():
    adapter = initialized("free", scale=0.02, mean=1.0)
    for rows, spread in ((adapter.code_input.rows.weight, 0.02), (adapter.code_output.rows.weight, 0.05)):
        torch.testing.assert_close(rows.detach().mean(0), torch.ones(HIDDEN), rtol=0, atol=0.02)
        assert rows.std(0).mean().item() == pytest.approx(spread, rel=0.05)
    assert not any(isinstance(module, CodebookRows) for module in adapter.modules())


@pytest.mark.parametrize("kind", ["codebook", "free"])
def test_gradients_reach_every_parameter(kind):
    adapter = initialized(kind)
    hidden = torch.randn(3, HIDDEN)
    (adapter.input_rows().square().sum() + (hidden @ adapter.code_rows().T).logsumexp(-1).sum()).backward()
    (hidden @ adapter.control_rows().T).square().sum().backward()
    assert [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_codebook_of_another_shape_and_an_unknown_kind_are_refused():
    with pytest.raises(ValueError, match=r"codebook \(256, 8\), got \(256, 9\)"):
        initialized().initialize(torch.zeros(K, 9), torch.zeros(5, HIDDEN), torch.zeros(5, HIDDEN))
    with pytest.raises(ValueError, match="adapter kind must be one of codebook, free, got 'codebok'"):
        TokenAdapter(K, WIDTH, HIDDEN, "codebok")
