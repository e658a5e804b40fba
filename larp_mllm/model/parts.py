"""The usual parts of a causal language model, for all ids: what `get_input_embeddings`, `get_decoder` and `get_output_embeddings` return.

They have no weights of their own: they read those of the base and the adapter, which may be replaced at any time, and name them as
their `parameters()`.

The vocabulary has two parts: text ids and video_start may follow text and video_end; video_end and codes may follow
video_start and codes. The decoder's hidden states have two columns more than the base's, which say where an id is inside a
span. The rows of the head read them, and exclude the other part. So the cross-entropy over all ids, as TRL computes it, is
the loss of the model, and text has the base's own probabilities, but for that of video_start.

Shapes: B batch, S sequence length, H hidden width, V all ids.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from larp_mllm.model.inputs import check_ids

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from larp_mllm.model.modeling import LarpMllmForCausalLM

# Added to logits of ids that cannot follow: finite, since infinity makes NaN of differences; within float16.
EXCLUDED = -3e4
_NAMES = "whole_embedding", "whole_decoder", "whole_head"


class _Part(nn.Module):
    def __init__(self, model: "LarpMllmForCausalLM"):
        super().__init__()
        # Not registered: a module of the model that has the model as a module would never end.
        object.__setattr__(self, "_model", model)

    def _reads(self) -> list[nn.Module]:
        raise NotImplementedError

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of the base and the adapter that it reads: so it is frozen with `requires_grad_(False)` as usual."""
        read = self._reads() if recurse else []
        yield from dict.fromkeys(parameter for module in read for parameter in module.parameters())


class Embedding(_Part):
    """Ids int64 (B, S) -> embeddings (B, S, H): text rows of the base, video rows of the adapter."""

    def _reads(self) -> list[nn.Module]:
        adapter = self._model.adapter
        return [self._model.base.get_input_embeddings(), adapter.code_input, adapter.control_input]

    @property
    def weight(self) -> Tensor:
        """The rows of all ids, (V, H), computed at each access; zero for entries of the text tokenizer without a row."""
        text, video = self._model.base.get_input_embeddings().weight, self._model.adapter.input_rows()
        missing = self._model.vocabulary.text_size - len(text)
        scale = self._model.config.embedding_scale  # of Gemma; video rows have it already
        return torch.cat([F.pad(text if scale == 1 else text * scale, (0, 0, 0, missing)), video.to(text.dtype)])

    @property
    def word_embeddings(self) -> "Embedding":
        """Itself, under the name that prompt tuning of peft looks for."""
        return self

    @property
    def num_embeddings(self) -> int:
        """V."""
        return self._model.vocabulary.size

    @property
    def embedding_dim(self) -> int:
        """H."""
        return self._model.base.get_input_embeddings().weight.shape[-1]

    def forward(self, input_ids: Tensor) -> Tensor:
        """Raises ValueError for text ids that the base has no row for, and for updates of peft to one of two tied layers."""
        model, v = self._model, self._model.vocabulary
        _check_tied(model.base)
        is_text = v.is_text(input_ids)
        model.check_known(input_ids)
        text = model.base.get_input_embeddings()(input_ids.masked_fill(~is_text, 0))
        video = F.embedding((input_ids - v.text_size).clamp_min(0), model.adapter.input_rows())
        return torch.where(is_text[..., None], text, video.to(text.dtype))

    @torch.no_grad()
    def video_ids(self, inputs_embeds: Tensor) -> Tensor:
        """Embeddings (B, S, H) -> int64 (B, S): the video ids that they are the rows of, which their bits tell; 0 for others."""
        rows = self._model.adapter.input_rows().to(self._model.base.get_input_embeddings().weight.dtype)
        known, order = _fingerprint(rows).sort()
        given = _fingerprint(inputs_embeds)
        at = torch.searchsorted(known, given).clamp_max(len(known) - 1)
        return torch.where(known[at] == given, order[at] + self._model.vocabulary.text_size, 0)


class Decoder(_Part):
    """The base's decoder on ids of text and video; its last_hidden_state is (B, S, H + 2), see above."""

    # Read by transformers where it shards models among devices.
    _tp_plan = _pp_plan = None

    def _reads(self) -> list[nn.Module]:
        return [self._model.base.base_model, *self._model.whole_embedding._reads()]

    def forward(self, input_ids: Tensor | None = None, *, inputs_embeds: Tensor | None = None, **options):
        """Arguments are those of the base's decoder. Raises ValueError for ids out of range, and unless one of both is given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids (B, S) or inputs_embeds (B, S, H)")
        check_ids(self._model.vocabulary, input_ids, None)
        ids = self._model.whole_embedding.video_ids(inputs_embeds) if input_ids is None else input_ids
        decoded = self._model.run_base(ids, inputs_embeds, **options)
        hidden, inside = decoded.last_hidden_state, self._model.vocabulary.is_inside(ids)
        where = torch.stack([inside, ~inside], dim=-1).to(hidden)
        decoded.last_hidden_state = torch.cat([hidden, where], dim=-1)
        return decoded


class Head(_Part):
    """Hidden states (..., H + 2) of the decoder -> logits of all ids (..., V); of (..., H), nothing is excluded."""

    def _reads(self) -> list[nn.Module]:
        adapter = self._model.adapter
        return [self._model.base.get_output_embeddings(), adapter.code_output, adapter.control_output]

    @property
    def weight(self) -> Tensor:
        """The rows of all ids, (V, H + 2), computed at each access."""
        model = self._model
        text, controls, codes = (
            model.base.get_output_embeddings().weight,
            model.adapter.control_rows(),
            model.adapter.code_rows(),
        )
        missing = model.vocabulary.text_size - len(text)
        rows = torch.cat([F.pad(text, (0, 0, 0, missing)), controls.to(text.dtype), codes.to(text.dtype)])
        of_span = torch.arange(len(rows), device=rows.device) > model.vocabulary.video_start
        return torch.cat([rows, EXCLUDED * torch.stack([~of_span, of_span], dim=-1).to(rows)], dim=-1)

    @property
    def bias(self) -> Tensor | None:
        """Of all ids (V,), or None: the base's, and what excludes entries of the text tokenizer without a row."""
        head, v = self._model.base.get_output_embeddings(), self._model.vocabulary
        bias, missing = getattr(head, "bias", None), v.text_size - len(head.weight)
        if bias is None and not missing:
            return None
        bias = head.weight.new_zeros(len(head.weight)) if bias is None else bias
        return F.pad(F.pad(bias, (0, missing), value=EXCLUDED), (0, v.size - v.text_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Text logits equal those of the base's head to the bit outside of spans."""
        model, width = self._model, self._model.whole_embedding.embedding_dim
        hidden, where = hidden[..., :width].contiguous(), hidden[..., width:].bool()
        logits = torch.cat([model.text_logits(hidden), model.code_logits(hidden)], dim=-1)
        if where.shape[-1]:
            first = model.vocabulary.video_end
            outside, inside = logits.tensor_split([first], dim=-1)
            outside.masked_fill_(where[..., :1], EXCLUDED)
            inside.masked_fill_(where[..., 1:], EXCLUDED)
        return logits


class WithParts:
    """The part of the model's class that hands out its parts, and keeps them."""

    base: PreTrainedModel
    whole_embedding: Embedding
    whole_decoder: Decoder
    whole_head: Head

    def add_parts(self) -> None:
        """Make the parts of a new model."""
        # accelerate looks for names of modules within those of tied weights: none of these may end one.
        self.whole_embedding, self.whole_decoder, self.whole_head = Embedding(self), Decoder(self), Head(self)

    @property
    def base_model(self) -> Decoder:
        """The decoder: other libraries look for it under this name."""
        return self.whole_decoder

    @property
    def embeddings(self) -> Embedding:
        """The embedding of all ids, where prompt tuning of peft looks for its `word_embeddings`."""
        return self.whole_embedding

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises ValueError for another part in place of one that has no weights, as peft puts there to train rows of it."""
        if name in _NAMES and name in self._modules:
            raise ValueError(
                f"{name} has no weights of its own that {type(value).__name__} could train: name the base's layer "
                '(trainable_token_indices={"embed_tokens": [...]} for rows of text), or train the rows of codes with '
                'modules_to_save=["adapter"]'
            )
        super().__setattr__(name, value)

    def named_modules(self, memo: set | None = None, prefix: str = "", remove_duplicate: bool = True):
        """All modules with their names. The head of all ids has also the name of the base's, before this one itself.

        So whoever leaves out what `get_output_embeddings` returns, by its name, leaves out the base's head: LoRA of all
        linear layers, quantization.
        """
        base = self._modules.get("base")
        text_head = None if base is None else base.get_output_embeddings()
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if module is text_head and "whole_head" in self._modules:
                yield name, self.whole_head
            yield name, module

    def get_decoder(self) -> Decoder:
        """The decoder of all ids."""
        return self.whole_decoder

    def get_input_embeddings(self) -> Embedding:
        """The embedding of all ids."""
        return self.whole_embedding

    def get_output_embeddings(self) -> Head:
        """The head of all ids."""
        return self.whole_head

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the base's text embedding. Raises ValueError for another shape."""
        if value is not self.whole_embedding:
            _check_same_shape("embedding", self.base.get_input_embeddings(), value)
            self.base.set_input_embeddings(value)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the base's text head. Raises ValueError for another shape."""
        if new_embeddings is not self.whole_head:
            _check_same_shape("head", self.base.get_output_embeddings(), new_embeddings)
            self.base.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *_, **__
    ):
        """Return the embedding unchanged. Raises ValueError for another number of rows, since text and video ids share them."""
        rows = self.config.vocab_size
        if new_num_tokens not in (None, rows) or pad_to_multiple_of is not None:
            raise ValueError(
                f"the embedding of a model with video ids cannot be resized (it has {rows} rows, and the ids of videos begin "
                "behind those of text): resize the base model and train with it, or resize a stock checkpoint written with "
                "larp-mllm export"
            )
        return self.get_input_embeddings()


def _check_same_shape(what: str, old: nn.Module, new: nn.Module) -> None:
    if getattr(new, "weight", None) is None or new.weight.shape != old.weight.shape:
        raise ValueError(
            f"the {what} of the base model is {tuple(old.weight.shape)} and keeps this shape, got {new}: the ids of videos "
            "begin behind its rows"
        )


def _check_tied(base: nn.Module) -> None:
    # Layers of peft that update the embedding or the head alone: merged, they would change the weights of both.
    layers = base.get_input_embeddings(), base.get_output_embeddings()
    if not any(hasattr(layer, "base_layer") or hasattr(layer, "token_adapter") for layer in layers):
        return
    embedding, head = (getattr(getattr(layer, "token_adapter", layer), "base_layer", layer).weight for layer in layers)
    if embedding is head:
        raise ValueError(
            "an update of the embedding or the head alone cannot be merged into this base, where both are the same weights: leave "
            'them out, or train a copy of them with modules_to_save=["embed_tokens"] of peft'
        )


def _fingerprint(rows: Tensor) -> Tensor:
    """One int64 of the bits of each row (..., H)."""
    bits = rows.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]).long()
    odd = 2 * torch.arange(1, rows.shape[-1] + 1, device=rows.device) + 1
    return (bits * (odd * 0x1E3779B97F4A7C15)).sum(-1)  # integers overflow alike everywhere
