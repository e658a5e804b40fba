"""Builders of tiny random models and token caches."""

from collections.abc import Sequence
from pathlib import Path

from larp.data import token_cache as tokens
from larp.data.token_cache import TokenCache
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig
from larp_mllm.model.base_models import load_base
from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.pipeline import Mllm
from larp_mllm.processing.processor import LarpMllmProcessor

import torch

CAPTIONS = [
    "a red circle moving left",
    "a blue square moving up",
    "a person surfing",
    "a green triangle moving down slowly",
]
N, K = 4, 16


def tiny_video_tokenizer(seed: int = 0) -> LarpTokenizer:
    """A tokenizer of clips of 4 frames of 16x16 pixels: 4 codes of 16."""
    torch.manual_seed(seed)
    small = dict(encoder_width=16, encoder_depth=1, encoder_heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)
    config = TokenizerConfig(4, 16, 16, (2, 8, 8), None, N, K, 4, **small, prior=PriorConfig(enabled=False))
    return LarpTokenizer(config).eval()


def tiny_mllm(base: str = "tiny-qwen2", adapter: str = "codebook") -> Mllm:
    """A random base of two layers with adapter and processor."""
    torch.manual_seed(0)
    video_tokenizer = tiny_video_tokenizer()
    language_model, text_tokenizer = load_base(base, CAPTIONS, layers=2, width=32, heads=2)
    model = LarpMllmForCausalLM.from_base(
        language_model,
        len(text_tokenizer),
        video_tokenizer.codebook,
        video_tokenizer.num_tokens,
        adapter,
        video_tokenizer_hash=video_tokenizer.weight_hash(),
    ).eval()
    return Mllm(model, LarpMllmProcessor(text_tokenizer, video_tokenizer, model.vocabulary))


def tiny_cache(
    folder: Path,
    rows: int = 80,
    classes: tuple[str, ...] = (),
    key: dict | None = None,
    seed: int = 0,
    captions: Sequence[str] = CAPTIONS,
) -> Path:
    """A token cache whose codes depend on the caption (or class), built without videos; returns its folder.

    seed: of the video tokenizer.
    """
    video_tokenizer = tiny_video_tokenizer(seed)
    where = str(video_tokenizer.save_pretrained(folder / "tokenizer"))
    number = torch.arange(rows)
    kinds = len(classes) or len(captions)
    kind = number % kinds
    columns = {
        "codes": ((kind[:, None] * 3 + torch.arange(N)) % K).to(torch.int16),
        "labels": kind if classes else torch.full((rows,), -1),
        "videos": number,
        "starts": torch.zeros(rows, dtype=torch.int64),
        "flipped": torch.zeros(rows, dtype=torch.bool),
    }
    texts = [None if classes else captions[i] for i in kind.tolist()]
    key = {"tokenizer": video_tokenizer.weight_hash(), "num_tokens": N, "codebook_size": K, "stride": 1} | (key or {})
    tokens.begin_cache(folder / "cache", key)
    notes = [[i, f"video{i}", texts[i]] for i in range(rows)]
    tokens.write_shard(tokens.shard_path(folder / "cache", 0), columns, notes, [])
    tokens.finish_cache(folder / "cache", key, classes, where, 1)
    return folder / "cache"


def open_cache(folder: Path, **options) -> TokenCache:
    """Build and open a `tiny_cache`."""
    return TokenCache.open(tiny_cache(folder, **options))


def colourful_mllm() -> Mllm:
    """`tiny_mllm` whose videos differ: an untrained video tokenizer decodes all codes to the same grey."""
    mllm = tiny_mllm()
    head = mllm.processor.video_tokenizer.head
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        head.weight.normal_(std=0.2, generator=generator)
        head.bias.fill_(0.5)
    # A saved model is loaded with the tokenizer of this hash alone.
    mllm.model.config.video_tokenizer_hash = mllm.processor.video_tokenizer.weight_hash()
    return mllm


def favour_videos(mllm: Mllm, monkeypatch, bonus: float = 4.0) -> None:
    """Raise the logit of video_start by `bonus`: a model with random weights rarely begins a video."""
    plain, start = mllm.model.text_logits, mllm.model.vocabulary.video_start

    def text_logits(hidden: torch.Tensor) -> torch.Tensor:
        logits = plain(hidden)
        logits[..., start] += bonus
        return logits

    monkeypatch.setattr(mllm.model, "text_logits", text_logits)


def every_logit(model: LarpMllmForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits (B, S, V) without the exclusion of ids that may not follow, which an exported model does not have."""
    hidden = model.get_decoder()(input_ids=ids).last_hidden_state
    return model.get_output_embeddings()(hidden[..., : model.config.hidden_size])
