"""`generate` of an export: videos of exactly N codes, for servers, which take no logits processor from a client.

`larp-mllm export` copies this file to custom_generate/generate.py, and transformers calls it in place of its own `generate`
with `trust_remote_code=True`. It needs no larp_mllm. N is `tokens_per_video` of config.json.
"""

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList


def generate(inputs: Tensor | None = None, *, model, logits_processor=None, **options):
    """`generate` of transformers with `VideoSpans` among its logits processors; arguments and result are the same."""
    options.pop("custom_generate", None)
    spans = VideoSpans(model.config.video_start, model.config.tokens_per_video)
    processors = LogitsProcessorList([*(logits_processor or []), spans])
    # Not model.generate, which is this function.
    return GenerationMixin.generate(model, inputs, logits_processor=processors, **options)


class VideoSpans(LogitsProcessor):
    """Masks ids that may not follow: after video_start exactly N codes, then video_end; elsewhere no code and no video_end.

    Ids are text | video_start | video_end | codes.
    """

    def __init__(self, video_start: int, tokens_per_video: int):
        self.video_start, self.tokens_per_video = video_start, tokens_per_video

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Ids so far (B, S) and next logits (B, V) -> logits with -inf for ids that may not follow."""
        start, count, length = self.video_start, self.tokens_per_video, input_ids.shape[1]
        places = torch.arange(length, device=input_ids.device)
        last = torch.where(input_ids == start, places, -count - 2).amax(-1, keepdim=True)
        sampled = length - 1 - last  # since video_start; above N outside a span
        ids = torch.arange(scores.shape[-1], device=scores.device)
        inside = torch.where(sampled < count, ids > start + 1, ids == start + 1)
        return scores.masked_fill(~torch.where(sampled <= count, inside, ids <= start), -torch.inf)
