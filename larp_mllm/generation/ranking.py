"""The model as a reader of its own videos: how probable it finds a text after each of them.

Shapes: B videos, N codes of a video.
"""

from collections.abc import Sequence

from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.processing.token_sequence import Layout

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.inference_mode()
def text_nats(
    model: LarpMllmForCausalLM, layout: Layout, codes: Tensor, texts: Sequence[Sequence[int]], batch_size: int = 32
) -> Tensor:
    """Return the nats that each text costs as the caption of its video, its end included: float64 (B,) on the CPU.

    Args:
        codes: int64 (B, N) in [0, K).
        texts: B lists of text ids.
        batch_size: videos in one pass; changes only rounding.

    The softmax is over the text ids: a caption holds no other.
    """
    ends = [] if layout.eos is None else [layout.eos]
    nats = torch.empty(len(codes), dtype=torch.float64)
    for first in range(0, len(codes), batch_size):
        captions = [[*text, *ends] for text in texts[first : first + batch_size]]
        prompts = [layout.question(row) for row in codes[first : first + batch_size].tolist()]
        before, longest = len(prompts[0]), max(map(len, captions))
        ids = torch.zeros(len(prompts), before + longest, dtype=torch.int64)
        for row, (prompt, caption) in enumerate(zip(prompts, captions, strict=True)):
            ids[row, : before + len(caption)] = torch.tensor([*prompt, *caption])
        # Causal attention does not see padding on the right.
        states = model.run_base(ids.to(model.device), use_cache=False).last_hidden_state[:, before - 1 : -1]
        logits = model.text_logits(states)[..., : layout.vocabulary.text_size].float()
        wanted = ids[:, before:].to(logits.device)
        each = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").double()
        lengths = torch.tensor([len(caption) for caption in captions], device=each.device)
        nats[first : first + batch_size] = (
            each.masked_fill(torch.arange(longest, device=each.device) >= lengths[:, None], 0.0).sum(dim=1).cpu()
        )
    return nats
