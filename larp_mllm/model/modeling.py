"""LarpMllmForCausalLM: a causal language model that also reads and writes video codes, its text side untouched.

Text ids go through the base model's own embedding and head; video ids go through the TokenAdapter. Shapes: B batch, S
sequence, H hidden width, V rows of the base head, K codes, N codes per video.
"""

import inspect
import os
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from larp.hub import check_fit
from larp_mllm.model.adapter import TokenAdapter
from larp_mllm.model.chunked_loss import Head, is_cut, score
from larp_mllm.model.configuration import LarpMllmConfig
from larp_mllm.model.vocabulary import IGNORE, Vocabulary
from larp_mllm.model.weights import check_finite, check_folder, quiet

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.utils import TransformersKwargs, can_return_tuple


def check_options(options: dict[str, Any], decoder: PreTrainedModel) -> None:
    """TypeError unless each of the options is one of `decoder`, or one that transformers hands on to attention."""
    unknown = options.keys() - TransformersKwargs.__optional_keys__
    if unknown and (unknown := unknown - inspect.signature(decoder.forward).parameters.keys()):
        raise TypeError(
            f"forward() got an unexpected keyword argument {min(unknown)!r}: neither this model nor its base takes it"
        )


def check_ids(vocabulary: Vocabulary, ids: Tensor | None, labels: Tensor | None) -> None:
    """ValueError unless ids, where given, are ids of the model, and labels are those or -100.

    It waits for the device once in all. Under torch.compile, whose graph that would break, nothing is checked.
    """
    given = {} if ids is None else {"input_ids": ids}
    if labels is not None:
        given["labels"] = labels.masked_fill(labels == IGNORE, 0)
    given = {name: values for name, values in given.items() if values.numel()}
    if not given or torch.compiler.is_compiling():
        return
    ends = torch.stack([end for values in given.values() for end in torch.aminmax(values)]).tolist()
    for name, low, high in zip(given, ends[::2], ends[1::2], strict=True):
        if low < 0 or high >= vocabulary.size:
            raise ValueError(
                f"{name} holds {low if low < 0 else high}, but the ids of this model are 0 to {vocabulary.size - 1}"
                f"{f' (and {IGNORE} in labels: not a target)' if name == 'labels' else ''}: take the processor that was "
                "saved with the model"
            )


def kept(hidden: Tensor, positions: int | Tensor) -> Tensor:
    """Hidden states (B, S, H) at some positions, chosen as by `logits_to_keep` of transformers' models.

    positions: so many last ones (0: all), int64 (n,) for all rows or (B, n) for each, or bool (B, S), which gives (n, H).
    """
    if isinstance(positions, Tensor) and positions.ndim == 2:
        return (
            hidden[positions] if positions.dtype == torch.bool else hidden.take_along_dim(positions[..., None], dim=1)
        )
    return hidden[:, slice(-positions, None) if isinstance(positions, int) else positions]


@dataclass
class LarpMllmOutput(ModelOutput):
    """What forward returns; sums and counts rather than means, so that they add up exactly over batches and ranks."""

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
        """Attach a fresh adapter to `base`. codebook: (K, d) float; `extra` goes into the config (fps, ...).

        Raises ValueError for a base without a head of the width of its embedding, or one that changes its logits after
        the head, for a codebook of another shape, and for values that the config refuses.
        """
        if codebook.ndim != 2:
            raise ValueError(f"the codebook must be a table (codes, width), got shape {tuple(codebook.shape)}")
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        if head is None or head.weight.shape[-1] != embedding.weight.shape[-1]:
            raise ValueError(
                f"the base model ({type(base).__name__}) has no language-model head of the width of its embedding: load "
                "a Llama, Qwen, Mistral or SmolLM with AutoModelForCausalLM"
            )
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
        model = cls(config, base).to(embedding.weight.device, base.dtype)
        model.adapter.start(codebook.to(embedding.weight), embedding.weight, head.weight)
        return model

    @classmethod
    def from_pretrained(cls, path, *args, output_loading_info: bool = False, **kwargs):
        """Load strictly: a missing, unknown or misshapen tensor is a ValueError, not a silent random weight.

        So are files of weights that are truncated, absent or pickled, sizes that cannot be, and NaN or infinity; the
        message names file or tensor.
        """
        # Those of other sizes are named below, with all others; pickles can run code.
        kwargs |= {"ignore_mismatched_sizes": True, "use_safetensors": True}
        folder = Path(path, kwargs.get("subfolder", "")) if isinstance(path, (str, os.PathLike)) else None
        try:
            with quiet(bars=True):
                if folder is not None and folder.is_dir():
                    check_folder(cls, folder, kwargs.get("config"))
                model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path}/model.safetensors cannot be read ({error}); it may be missing or truncated: copy the model "
                "folder again, or write it again with training/train_mllm.py --resume"
            ) from error
        wrong = [f"{name} is missing" for name in info["missing_keys"]]
        wrong += [f"{name} is unknown" for name in info["unexpected_keys"]]
        wrong += [f"{name} has shape {tuple(a)} in place of {tuple(b)}" for name, a, b in info["mismatched_keys"]]
        check_fit(wrong, str(path))
        check_finite(model, str(path))
        return (model, info) if output_loading_info else model

    @property
    def vocabulary(self) -> Vocabulary:
        """The id layout."""
        return self.config.vocabulary

    def get_input_embeddings(self):
        """The base model's text embedding; video ids have their rows in `adapter`."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self):
        """The base model's text head; video ids have their rows in `adapter`."""
        return self.base.get_output_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Give the base another text embedding; ValueError for one of another shape."""
        _check_same_shape("embedding", self.get_input_embeddings(), value)
        self.base.set_input_embeddings(value)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Give the base another text head; ValueError for one of another shape."""
        _check_same_shape("head", self.get_output_embeddings(), new_embeddings)
        self.base.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *_, **__
    ):
        """The base model's text embedding, as it is; ValueError for another number of rows: ids of videos lie behind it."""
        rows = self.config.text_config.vocab_size
        if new_num_tokens not in (None, rows) or pad_to_multiple_of is not None:
            raise ValueError(
                f"the text embedding of a model with video ids cannot be resized (it has {rows} rows, and the ids of videos "
                "begin behind them): resize the base model and train with it, or write a stock checkpoint with larp-mllm "
                "export and resize that"
            )
        return self.get_input_embeddings()

    def embed(self, input_ids: Tensor) -> Tensor:
        """ids (B, S) int64 -> (B, S, H): text rows from the base, video rows from the adapter."""
        is_text = self.vocabulary.is_text(input_ids)
        self._check_known(input_ids)
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
        """One pass. ids and labels: int64 (B, S), label -100 = not a target; labels are shifted inside.

        In place of input_ids, inputs_embeds (B, S, H) may be given. The other options are those of transformers' models;
        what it hands on to attention goes to the base. logits_to_keep: for so many last positions, or those of a tensor.
        position_ids that restart in a row, without an attention_mask, are records packed into it: none sees another.
        loss = sum over targets of weight * (nll + z_loss * log(sum of exp(logits))^2) / num_items_in_batch (default: the
        targets of this batch), in nats, with weight `text_weight` for text and 1 for codes. Logits exist for at most
        `head_chunk` positions at a time. Raises ValueError for ids and labels that the model does not have, TypeError for
        unknown options.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids (B, S) or inputs_embeds (B, S, H)")
        check_options(kwargs, self.base.base_model)
        check_ids(self.vocabulary, input_ids, labels)
        for option in ("output_hidden_states", "output_attentions"):
            if getattr(self.config, option, False):
                kwargs.setdefault(option, True)
        decoded = self.base.base_model(
            inputs_embeds=self.embed(input_ids) if inputs_embeds is None else inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=bool(use_cache) and labels is None,
            **kwargs,
        )
        hidden = decoded.last_hidden_state
        inner = {"hidden_states": decoded.hidden_states, "attentions": decoded.attentions}
        if labels is None:
            hidden = kept(hidden, logits_to_keep)
            logits = torch.cat([self.text_logits(hidden), self.code_logits(hidden)], dim=-1)
            return LarpMllmOutput(logits=logits, past_key_values=decoded.past_key_values, **inner)
        if labels.shape != hidden.shape[:2]:
            raise ValueError(f"labels must be {tuple(hidden.shape[:2])} like the ids, got {tuple(labels.shape)}")
        scores = self._score(hidden[:, :-1], labels[:, 1:], num_items_in_batch, text_weight, z_loss, head_chunk)
        return LarpMllmOutput(**scores, **inner)

    def compute_transition_scores(
        self,
        sequences: Tensor,
        scores: tuple[Tensor, ...],
        beam_indices: Tensor | None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """As transformers' own, which would count with the ids of the base alone: the score of each id that was written."""
        if beam_indices is None:
            beam_indices = torch.arange(len(sequences), device=sequences.device)[:, None].expand(-1, len(scores))
        written = int((beam_indices >= 0).sum(-1).max())
        beam_indices = beam_indices[:, :written]
        steps = torch.stack(scores[:written])
        if normalize_logits:
            steps = steps.log_softmax(-1)
        place = torch.arange(written, device=steps.device)
        chosen = steps[place, beam_indices.clamp_min(0), sequences[:, sequences.shape[1] - written :]]
        return chosen.masked_fill(beam_indices < 0, 0)

    def _beam_search(self, *args, **options):
        """As transformers' own, of which older releases would count with the ids of the base alone."""
        text, config, self.config = copy(self.config.text_config), self.config, copy(self.config)
        text.vocab_size = config.vocab_size
        self.config.get_text_config = lambda *_, **__: text
        try:
            return super()._beam_search(*args, **options)
        finally:
            self.config = config

    def _score(
        self,
        hidden: Tensor,
        targets: Tensor,
        num_items: float | None,
        text_weight: float,
        z_loss: float,
        head_chunk: int,
    ) -> dict[str, Tensor]:
        # Inside a span only codes can be sampled, so code targets are scored among codes, and everything else among text
        # and controls. Both heads run even on an empty selection: every rank must touch every parameter.
        is_code = self.vocabulary.is_code(targets)
        is_text = (targets != IGNORE) & ~is_code
        counts = {"text": is_text.sum(), "video": is_code.sum()}
        # As indices: a mask would wait for the device each time it is used.
        at_text, at_code = is_text.nonzero(as_tuple=True), is_code.nonzero(as_tuple=True)
        codes, text = self.vocabulary.id_to_code(targets[at_code]), self._text_classes(targets[at_text])
        head = self._text_head()
        # Where the head is cut up among ranks, all of them must call it equally often, whatever their targets are.
        pieces = _pieces(targets.numel() if head.cut else len(text), head_chunk)
        scores = {
            "text": score(head, hidden[at_text], text, pieces, text_weight, z_loss),
            "video": score(self._code_head(), hidden[at_code], codes, _pieces(len(codes), head_chunk), 1.0, z_loss),
        }
        if num_items is None:
            num_items = (counts["text"] + counts["video"]).clamp_min(1)
        return {
            "loss": (scores["video"].loss + scores["text"].loss) / num_items,
            **{f"{kind}_count": count for kind, count in counts.items()},
            **{f"{kind}_nll": own.nll.detach() for kind, own in scores.items()},
            **{f"{kind}_correct": own.correct for kind, own in scores.items()},
        }

    def _text_head(self) -> Head:
        head, controls = self.base.get_output_embeddings(), self.adapter.control_rows()
        trained = (parameter for parameter in head.parameters() if parameter.requires_grad)
        return Head(lambda hidden: (head(hidden), hidden @ controls.T), (controls, *trained), is_cut(head))

    def _code_head(self) -> Head:
        rows = self.adapter.code_rows()
        return Head(lambda hidden: (hidden @ rows.T,), (rows,))

    def _text_classes(self, ids: Tensor) -> Tensor:
        """Ids of text and controls -> their places among the rows of the base's head and the two controls."""
        self._check_known(ids)
        gap = self.vocabulary.text_size - self.config.text_config.vocab_size
        return torch.where(self.vocabulary.is_text(ids), ids, ids - gap)

    def _check_known(self, ids: Tensor) -> None:
        rows, known = self.config.text_config.vocab_size, self.vocabulary
        if known.text_size > rows and (unknown := ids[(ids >= rows) & known.is_text(ids)]).numel():
            raise ValueError(
                f"text id {int(unknown[0])} is an entry of the text tokenizer that the base model has no row for (it has "
                f"{rows}): leave such tokens out of the text, or take the tokenizer that the base model was trained with"
            )


def _check_same_shape(what: str, old: nn.Module, new: nn.Module) -> None:
    if getattr(new, "weight", None) is None or new.weight.shape != old.weight.shape:
        raise ValueError(
            f"the {what} of the base model is {tuple(old.weight.shape)} and keeps this shape, got {new}: the ids of videos "
            "begin behind its rows"
        )


def _pieces(positions: int, head_chunk: int) -> int:
    return max(1, -(-positions // head_chunk))


AutoModelForCausalLM.register(LarpMllmConfig, LarpMllmForCausalLM)
