"""LarpMllmForCausalLM: a causal language model that also reads and writes video codes, its text side untouched.

Text ids go through the base model's own embedding and head; video ids go through the TokenAdapter. Shapes: B batch, S
sequence, H hidden width, V rows of the base head, K codes, N codes per video.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from larp_mllm.adapter import TokenAdapter
from larp_mllm.home import MODEL_TYPE
from larp_mllm.vocabulary import Vocabulary

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import ModelOutput

IGNORE = -100


class LarpMllmConfig(PreTrainedConfig):
    """The base model's config (`text_config`), the id layout, and what the video tokenizer must be.

    `text_size` is the first id that is not text (see Vocabulary), `video_tokenizer_hash` the weight hash of the LARP
    tokenizer whose codes the model speaks, `fps` and `frame_stride` describe the clips it was trained on.
    """

    model_type = MODEL_TYPE
    sub_configs_defaults: ClassVar = {"text_config": SubConfigSpec(AutoConfig, model_type="qwen2")}

    text_config: Any = None
    text_size: int = 0
    codebook_size: int = 0
    code_dim: int = 0
    tokens_per_video: int = 0
    adapter: str = "codebook"
    video_tokenizer_hash: str = ""
    fps: float = 8.0
    frame_stride: int = 1

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        rows = self.text_config.vocab_size
        # 0 is the library's own doing: it makes a config without arguments to find what differs from it when saving.
        if self.text_size and self.text_size < rows:
            raise ValueError(
                f"config.json: text_size is {self.text_size}, below the base model's {rows} embedding rows"
            )

    @property
    def vocabulary(self) -> Vocabulary:
        """The id layout that this config records."""
        return Vocabulary(self.text_size, self.codebook_size, self.tokens_per_video)


@dataclass
class LarpMllmOutput(ModelOutput):
    """What forward returns; sums and counts rather than means, so that they add up exactly over batches and ranks."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    text_nll: Tensor | None = None
    text_correct: Tensor | None = None
    text_count: Tensor | None = None
    video_nll: Tensor | None = None
    video_correct: Tensor | None = None
    video_count: Tensor | None = None


class LarpMllmForCausalLM(PreTrainedModel, GenerationMixin):
    """A base causal LM with a TokenAdapter beside it; the base is never resized.

    Without labels, forward gives logits (B, S, text_size + 2 + K), the text part exactly the base model's. With labels,
    it gives the loss and never builds text logits for positions whose target is a code.
    """

    config: LarpMllmConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement: ClassVar = ["past_key_values"]

    def __init__(self, config: LarpMllmConfig, base: PreTrainedModel | None = None):
        super().__init__(config)
        self.base = base if base is not None else AutoModelForCausalLM.from_config(config.text_config)
        hidden = self.base.get_input_embeddings().weight.shape[-1]
        self.adapter = TokenAdapter(config.codebook_size, config.code_dim, hidden, config.adapter)
        self.post_init()

    @classmethod
    def from_base(
        cls,
        base: PreTrainedModel,
        tokenizer_length: int,
        codebook: Tensor,
        tokens_per_video: int,
        adapter: str = "codebook",
        **extra,
    ) -> "LarpMllmForCausalLM":
        """Attach a fresh adapter to `base`. codebook: (K, d) float; `extra` goes into the config (fps, ...)."""
        vocabulary = Vocabulary.for_base(base.config.vocab_size, tokenizer_length, len(codebook), tokens_per_video)
        config = LarpMllmConfig(
            text_config=base.config,
            text_size=vocabulary.text_size,
            codebook_size=len(codebook),
            code_dim=codebook.shape[1],
            tokens_per_video=tokens_per_video,
            adapter=adapter,
            # Left out, transformers would reset the base's own choice to the slow default.
            attn_implementation=base.config._attn_implementation,
            **extra,
        )
        model = cls(config, base).to(base.dtype)
        embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
        model.adapter.start(codebook.to(embedding), embedding, head)
        return model

    @classmethod
    def from_pretrained(cls, path, *args, output_loading_info: bool = False, **kwargs):
        """Load strictly: a missing, unknown or misshapen tensor is a ValueError, not a silent random weight.

        So is a file of weights that is truncated or absent; the message names it.
        """
        try:
            model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path}/model.safetensors cannot be read ({error}); it may be missing or truncated: copy the model "
                "folder again, or write it again with training/train_mllm.py --resume"
            ) from error
        wrong = [*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])]
        if wrong:
            raise ValueError(
                f"{path}: {len(wrong)} tensors are missing, unknown or misshapen, first: {', '.join(sorted(wrong)[:3])}"
            )
        return (model, info) if output_loading_info else model

    @property
    def vocabulary(self) -> Vocabulary:
        """The id layout."""
        return self.config.vocabulary

    def get_input_embeddings(self):
        """The base model's text embedding; video ids have their rows in `adapter`."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self):
        """The base model's text head."""
        return self.base.get_output_embeddings()

    def embed(self, input_ids: Tensor) -> Tensor:
        """ids (B, S) int64 -> (B, S, H): text rows from the base, video rows from the adapter."""
        is_text = self.vocabulary.is_text(input_ids)
        text = self.base.get_input_embeddings()(input_ids.masked_fill(~is_text, 0))
        video = F.embedding((input_ids - self.vocabulary.text_size).clamp_min(0), self.adapter.input_rows())
        return torch.where(is_text[..., None], text, video.to(text.dtype))

    def text_logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., text_size + 2): the base model's own logits, then video_start and video_end."""
        text = self.base.get_output_embeddings()(hidden)
        missing = self.vocabulary.text_size - text.shape[-1]
        if missing:  # a tokenizer with more entries than the base has rows: those ids do not exist for the model
            text = F.pad(text, (0, missing), value=float("-inf"))
        return torch.cat([text, hidden @ self.adapter.control_rows().T], dim=-1)

    def code_logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., K)."""
        return hidden @ self.adapter.code_rows().T

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: float | None = None,
        text_weight: float = 1.0,
        **kwargs,
    ) -> LarpMllmOutput:
        """One pass. ids and labels: int64 (B, S), label -100 = not a target; labels are shifted inside.

        loss = (video nll + text_weight * text nll) / num_items_in_batch (default: the targets of this batch), in nats.
        """
        decoded = self.base.base_model(
            inputs_embeds=self.embed(input_ids) if inputs_embeds is None else inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=bool(use_cache) and labels is None,
            **kwargs,
        )
        hidden = decoded.last_hidden_state
        if labels is None:
            hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
            logits = torch.cat([self.text_logits(hidden), self.code_logits(hidden)], dim=-1)
            return LarpMllmOutput(logits=logits, past_key_values=decoded.past_key_values)
        return self._score(hidden[:, :-1], labels[:, 1:], num_items_in_batch, text_weight)

    def _score(self, hidden: Tensor, targets: Tensor, num_items: float | None, text_weight: float) -> LarpMllmOutput:
        # Inside a span only codes can be drawn, so code targets are scored among codes, and everything else among text
        # and controls. Both heads run even on an empty selection: every rank must touch every parameter.
        is_code = self.vocabulary.is_code(targets)
        is_text = (targets != IGNORE) & ~is_code
        video = _tally(self.code_logits(hidden[is_code]), self.vocabulary.id_to_code(targets[is_code]))
        text = _tally(self.text_logits(hidden[is_text]), targets[is_text])
        if num_items is None:
            num_items = (text[2] + video[2]).clamp_min(1)
        names = ("nll", "correct", "count")
        return LarpMllmOutput(
            loss=(video[0] + text_weight * text[0]) / num_items,
            **{f"text_{name}": value.detach() for name, value in zip(names, text, strict=True)},
            **{f"video_{name}": value.detach() for name, value in zip(names, video, strict=True)},
        )


def _tally(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, classes), (n,) -> summed nll in nats, number right, number of targets; all zero for n = 0."""
    nll = F.cross_entropy(logits.float(), targets, reduction="sum")
    return nll, (logits.argmax(-1) == targets).sum(), torch.tensor(len(targets), device=targets.device)


AutoConfig.register(LarpMllmConfig.model_type, LarpMllmConfig)
AutoModelForCausalLM.register(LarpMllmConfig, LarpMllmForCausalLM)
