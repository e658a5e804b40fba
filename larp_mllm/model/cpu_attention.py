"""Attention of a base language model in training on CPUs that multiply bfloat16, where torch's fused attention does not.

It saves a tenth of a training step of SmolLM2-135M (LOG.md). Whatever it is not made for goes to transformers' "sdpa".
"""

from larp.kernels.bf16_attention import fused_is_slow

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "larp_bf16"
# Beyond, the scores of all queries and keys take more time than they save.
_MOST_KEYS = 640


def use_cpu_attention(base: PreTrainedModel) -> None:
    """Let a base on a CPU train with this attention, if it is faster there and the base uses "sdpa"."""
    if base.device.type == "cpu" and fused_is_slow() and base.config._attn_implementation == "sdpa":
        base.set_attn_implementation(NAME)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options,
) -> tuple[Tensor, None]:
    """Attention of query (B, H, S, D) to key and value (B, G, S, D), G groups of heads; returns (B, S, H, D) in bfloat16.

    attention_mask: bool (B, 1, S, S), True where a query sees a key; None: causal.
    """
    (rows, heads, length, width), groups = query.shape, key.shape[1]
    fits = length == key.shape[2] <= _MOST_KEYS and dropout == 0 and module.is_causal
    if not (fits and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    with torch.autocast("cpu", enabled=False):
        query = (query * (width**-0.5 if scaling is None else scaling)).to(torch.bfloat16)
        key, value = key.to(torch.bfloat16), value.to(torch.bfloat16)
        # Heads of a group share keys: their queries are one long list.
        scores = query.reshape(rows, groups, -1, width) @ key.mT
        seen = attention_mask
        if seen is None:
            seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril_()[None, None]
        scores = scores.view(rows, groups, -1, length, length).masked_fill_(~seen[:, :, None], float("-inf"))
        out = scores.softmax(-1).view(rows, groups, -1, length) @ value
    return out.view(rows, heads, length, width).transpose(1, 2), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
