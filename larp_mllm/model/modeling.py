"""LarpMllmForCausalLM: a causal language model whose vocabulary includes video codes.

Text ids use the base model's own embedding and head, video ids the TokenAdapter. Shapes: B batch, S sequence length, H
hidden width, K codes.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, ClassVar

from larp.hub import check_fit
from larp_mllm.locate import first_line
from larp_mllm.model.chunked_loss import OutputHead, chunked_cross_entropy, is_sharded
from larp_mllm.model.configuration import LarpMllmConfig
from larp_mllm.model.inputs import check_ids, check_options, select_positions
from larp_mllm.model.partial_lora import PROJECTIONS, add_partial_lora, at_positions, for_recomputation
from larp_mllm.model.parts import WithParts
from larp_mllm.model.probe import check_parts, hidden_norm, linear_layers, measure_base
from larp_mllm.model.token_adapter import TokenAdapter, keeping_rows, residual_rank
from larp_mllm.model.vocabulary import IGNORE, Vocabulary
from larp_mllm.model.weights import BASE, check_finite, check_folder, quiet

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple


@dataclass
class LarpMllmOutput(ModelOutput):
    """The result of forward: `*_nll` (nats), `*_correct` and `*_count` are sums, so that they add up over batches and ranks.

    `video_*` are of the targets inside of spans (codes and video_end), `text_*` of the others.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    text_nll: Tensor | None = None
    text_correct: Tensor | None = None
    text_count: Tensor | None = None
    video_nll: Tensor | None = None
    video_correct: Tensor | None = None
    video_count: Tensor | None = None


class LarpMllmForCausalLM(WithParts, PreTrainedModel, GenerationMixin):
    """A base causal language model with a TokenAdapter; the base is never resized.

    Without labels, forward returns logits (B, S, text_size + 2 + K), whose text part equals the base model's bit for bit;
    inside of spans text is excluded, outside codes (see parts.py). With labels, it returns the cross-entropy of these
    logits, and computes no text logits inside of spans.
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
        self.base = base if base is not None else AutoModelForCausalLM.from_config(config.base_config)
        if config.partial_lora_rank:
            add_partial_lora(self.base, config.partial_lora_rank, config.partial_lora_layers)
        hidden = self.base.get_input_embeddings().weight.shape[-1]
        self.adapter = TokenAdapter(
            config.codebook_size, config.code_dim, hidden, config.adapter, config.residual_rank, config.embedding_scale
        )
        self.add_parts()
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
        """Build a model of a base and a newly initialised adapter.

        Args:
            base: the base model.
            tokenizer_length: number of entries of its text tokenizer.
            codebook: float (K, d).
            tokens_per_video: number of codes N of a video.
            adapter: "codebook" or "free", see `TokenAdapter`.
            **extra: further fields of LarpMllmConfig.

        Raises ValueError for a base that `measure_base` refuses, a codebook that is not 2-D, and values that the config refuses.
        """
        if codebook.ndim != 2:
            raise ValueError(
                f"the codebook must be a table (codes, width), got shape {tuple(codebook.shape)}: pass tokenizer.codebook"
            )
        embedding, head = check_parts(base)
        vocabulary = Vocabulary.for_base(base.config.vocab_size, tokenizer_length, len(codebook), tokens_per_video)
        config = LarpMllmConfig(
            text_config=base.config,
            text_size=vocabulary.text_size,
            codebook_size=len(codebook),
            code_dim=codebook.shape[1],
            tokens_per_video=tokens_per_video,
            adapter=adapter,
            residual_rank=residual_rank(adapter, embedding.weight.shape[-1]),
            # Without it, transformers resets the base's choice to the slow default.
            attn_implementation=base.config._attn_implementation,
            **extra,
        )
        config.packing, config.embedding_scale = measure_base(base)
        model = cls(config, base).to(embedding.weight.device, base.dtype)
        model.adapter.initialize(codebook.to(embedding.weight), embedding.weight, head.weight, hidden_norm(base))
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """Load strictly: never a tensor that is missing in the files and filled in at random, unless `output_loading_info` asks
        for what is missing. A folder without its base (see without_base.py) takes no keyword but dtype.

        Raises ValueError, naming file or tensor, for tensors that are missing, unknown, of another shape or not finite,
        for files of weights that are truncated, absent or pickled, and for a config.json whose model cannot be built;
        TypeError for an unknown keyword.
        """
        # Mismatched sizes are reported below with all other errors; pickles can run code.
        kwargs |= {"ignore_mismatched_sizes": True, "use_safetensors": True}
        path = pretrained_model_name_or_path
        folder = Path(path, kwargs.get("subfolder", "")) if isinstance(path, (str, os.PathLike)) else None
        if folder is not None and (folder / BASE).is_file():
            # Here: it imports AutoTokenizer, whose import triggers that of this module (see auto_classes.py).
            from larp_mllm.model.without_base import load_with_base

            return load_with_base(cls, folder, kwargs.get("dtype"))
        try:
            with quiet(bars=True):
                if folder is not None and folder.is_dir() and not output_loading_info:
                    check_folder(cls, folder, kwargs.get("config"))
                model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path}/model.safetensors cannot be read ({error}); it may be missing or truncated: copy the model "
                "folder again, or write it again with training/train_mllm.py --resume"
            ) from error
        except (TypeError, AttributeError, KeyError) as error:
            unknown = [name for name in kwargs if f"unexpected keyword argument '{name}'" in str(error)]
            if unknown:
                raise TypeError(f"{cls.__name__}.from_pretrained knows no {unknown[0]}: leave it out") from error
            raise ValueError(
                f"{path}: config.json or generation_config.json is damaged ({first_line(error)[:200]}): copy the model folder again"
            ) from error
        if output_loading_info:
            return model, info
        wrong = [f"{name} is missing" for name in info["missing_keys"]]
        wrong += [f"{name} is unknown" for name in info["unexpected_keys"]]
        wrong += [f"{name} has shape {tuple(a)} in place of {tuple(b)}" for name, a, b in info["mismatched_keys"]]
        check_fit(wrong, str(path))
        check_finite(model, str(path))
        return model

    def add_partial_lora(self, rank: int, layers: Collection[str] | None = None) -> None:
        """Add updates of this rank to the base, see `PartialLoraLinear`; nothing changes where it has them.

        layers: the last names of the layers, by default `linear_layers`.

        Raises ValueError if it has updates of another rank, or lacks the layers.
        """
        if self.config.partial_lora_rank not in (0, rank):
            raise ValueError(
                f"this model has partial LoRA of rank {self.config.partial_lora_rank}, which cannot become {rank}: train with "
                f"--joint.lora-rank {self.config.partial_lora_rank}"
            )
        if not self.config.partial_lora_rank:
            layers = list(layers or linear_layers(self.base))
            add_partial_lora(self.base, rank, layers)
            self.config.partial_lora_rank = rank
            if set(layers) != set(PROJECTIONS):
                self.config.partial_lora_layers = layers

    @property
    def vocabulary(self) -> Vocabulary:
        """The id layout."""
        return self.config.vocabulary

    def run_base(self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **options):
        """Run the base's decoder; returns its output.

        Args:
            input_ids: int64 (B, S).
            inputs_embeds: (B, S, H); by default those of the ids, of which else only matters which are of videos.
            **options: of the base's decoder.
        """
        if inputs_embeds is None:
            inputs_embeds = self.whole_embedding(input_ids)
        if not self.config.partial_lora_rank:
            return self.base.base_model(inputs_embeds=inputs_embeds, **options)
        with at_positions(~self.vocabulary.is_text(input_ids)):
            return self.base.base_model(inputs_embeds=inputs_embeds, **options)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., H) -> logits (..., text_size + 2): text, video_start, video_end."""
        text = self.base.get_output_embeddings()(hidden)
        missing = self.vocabulary.text_size - text.shape[-1]
        if missing:  # entries of the text tokenizer that the base has no rows for
            text = F.pad(text, (0, missing), value=float("-inf"))
        return torch.cat([text, hidden @ self.adapter.control_rows().T], dim=-1)

    def code_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., H) -> logits of the codes (..., K)."""
        return hidden @ self.adapter.code_rows().T

    # Whose signatures transformers looks at.
    @wraps(GenerationMixin.generate, assigned=())
    def generate(self, *args, **kwargs):
        """As transformers' `generate`; the adapter's rows are computed once for all steps."""
        with keeping_rows():
            return super().generate(*args, **kwargs)

    @wraps(GenerationMixin.prepare_inputs_for_generation, assigned=())
    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict[str, Any]:
        """What forward gets at a step of transformers' `generate`, which hands on the tokenizers of stop_strings and assistants too."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return {name: value for name, value in inputs.items() if name not in ("tokenizer", "assistant_tokenizer")}

    def create_masks_for_generate(self, *, config: LarpMllmConfig, **options):
        """The attention masks of a step of transformers' `generate` with a static cache, as the base makes them.

        Those of `config.text_config` would be none, since a loaded base chooses its attention in a config of its own.
        """
        create = getattr(self.base, "create_masks_for_generate", create_masks_for_generate)
        return create(config=self.base.config, **options)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: float | None = None,
        text_weight: float = 1.0,
        z_loss: float = 0.0,
        head_chunk: int = 1024,
        **kwargs,
    ) -> LarpMllmOutput:
        """Return logits (B, S, text_size + 2 + K), or with labels the loss in nats.

        loss = sum over targets of weight * (nll + z_loss * log(sum of exp(logits))^2) / num_items_in_batch, with weight
        `text_weight` outside of spans and 1 inside. Targets text and video_start are scored among these, video_end and codes
        among those; a target of codes is video_end too.

        Args:
            input_ids: int64 (B, S).
            position_ids: int64 (B, S). Without an attention_mask, positions that restart within a row separate packed
                records, which do not attend to each other.
            inputs_embeds: (B, S, H), in place of input_ids.
            labels: int64 (B, S), -100 is not a target; shifted inside.
            logits_to_keep: the number of last positions (0: all), or a tensor of positions, see `select_positions`.
            num_items_in_batch: divisor of the loss; by default the number of targets.
            text_weight: weight of text targets.
            z_loss: weight of the squared log-normaliser.
            head_chunk: positions whose logits exist at a time, with labels.
            **kwargs: options of the base's decoder, and those that transformers passes on to attention.

        The other arguments are those of transformers' models. Raises ValueError for ids and labels out of range, and
        TypeError for unknown options.
        """
        check_options(kwargs, self.base.base_model)
        check_ids(self.vocabulary, None, labels)
        for option in ("output_hidden_states", "output_attentions"):
            if getattr(self.config, option, False):
                kwargs.setdefault(option, True)
        decoded = self.whole_decoder(
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=bool(use_cache) and labels is None,
            **kwargs,
        )
        hidden = decoded.last_hidden_state
        inner = {"hidden_states": decoded.hidden_states, "attentions": decoded.attentions}
        if labels is None:
            logits = self.whole_head(select_positions(hidden, logits_to_keep))
            return LarpMllmOutput(logits=logits, past_key_values=decoded.past_key_values, **inner)
        if labels.shape != hidden.shape[:2]:
            raise ValueError(f"labels must be {tuple(hidden.shape[:2])} like the ids, got {tuple(labels.shape)}")
        losses = self._losses(
            hidden[:, :-1, : self.whole_embedding.embedding_dim],
            labels[:, 1:],
            num_items_in_batch,
            text_weight,
            z_loss,
            head_chunk,
        )
        return LarpMllmOutput(**losses, **inner)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TokenAdapter):
            init.zeros_(module.codebook)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **options):
        if self.config.partial_lora_rank:
            gradient_checkpointing_func = partial(
                gradient_checkpointing_func, use_reentrant=False, context_fn=for_recomputation
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **options)

    def _losses(
        self,
        hidden: Tensor,
        targets: Tensor,
        num_items: float | None,
        text_weight: float,
        z_loss: float,
        head_chunk: int,
    ) -> dict[str, Tensor]:
        # Both heads run even without targets: every rank must use every parameter.
        end = self.vocabulary.video_end
        of_span, of_text = targets >= end, (targets != IGNORE) & (targets < end)
        counts = {"text": of_text.sum(), "video": of_span.sum()}
        # Indices, since each use of a mask synchronises with the device.
        text_at, span_at = of_text.nonzero(as_tuple=True), of_span.nonzero(as_tuple=True)
        spans, text = targets[span_at] - end, self._text_classes(targets[text_at])
        text_head, span_head = self._text_head(), self._span_head()
        # All ranks must call a sharded head equally often, whatever their targets are.
        text_chunks = _num_chunks(targets.numel() if text_head.sharded else len(text), head_chunk)
        span_chunks = _num_chunks(len(spans), head_chunk)
        sums = {
            "text": chunked_cross_entropy(text_head, hidden[text_at], text, text_chunks, text_weight, z_loss),
            "video": chunked_cross_entropy(span_head, hidden[span_at], spans, span_chunks, 1.0, z_loss),
        }
        if num_items is None:
            num_items = (counts["text"] + counts["video"]).clamp_min(1)
        return {
            "loss": (sums["video"].loss + sums["text"].loss) / num_items,
            **{f"{kind}_count": count for kind, count in counts.items()},
            **{f"{kind}_nll": own.nll.detach() for kind, own in sums.items()},
            **{f"{kind}_correct": own.correct for kind, own in sums.items()},
        }

    def _text_head(self) -> OutputHead:
        head, start = self.base.get_output_embeddings(), self.adapter.control_rows()[:1]
        trained = (parameter for parameter in head.parameters() if parameter.requires_grad)
        return OutputHead(lambda hidden: (head(hidden), hidden @ start.T), (start, *trained), is_sharded(head))

    def _span_head(self) -> OutputHead:
        rows = torch.cat([self.adapter.control_rows()[1:], self.adapter.code_rows()])
        return OutputHead(lambda hidden: (hidden @ rows.T,), (rows,))

    def _text_classes(self, ids: Tensor) -> Tensor:
        """Ids of text and video_start -> classes of the base's head rows followed by that of video_start."""
        self.check_known(ids)
        gap = self.vocabulary.text_size - self.config.base_rows
        return torch.where(self.vocabulary.is_text(ids), ids, ids - gap)

    def check_known(self, ids: Tensor) -> None:
        """Raise ValueError for text ids that the base model has no row for."""
        rows, v = self.config.base_rows, self.vocabulary
        if v.text_size > rows and (unknown := ids[(ids >= rows) & v.is_text(ids)]).numel():
            raise ValueError(
                f"text id {int(unknown[0])} is an entry of the text tokenizer that the base model has no row for (it has "
                f"{rows}): leave such tokens out of the text, or take the tokenizer that the base model was trained with"
            )


def _num_chunks(positions: int, head_chunk: int) -> int:
    return max(1, -(-positions // head_chunk))


AutoModelForCausalLM.register(LarpMllmConfig, LarpMllmForCausalLM)
