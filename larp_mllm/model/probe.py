"""What a base model does, measured by running it on a few short rows when it is attached: the name of an architecture does not say it.

    traits = measure_base(base)         # ValueError if codes cannot be added to it
    linear_layers(base)                 # what LoRA can update
    hidden_norm(base)                   # how long the hidden states are that the head gets

Nothing of the base is changed, and no random number is taken. Shapes: R rows, S ids, H hidden width, V rows of the embedding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from larp_mllm.model.configuration import positions_of

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

_REMEDY = "take a Llama, Qwen, Mistral or SmolLM"
_IDS = 3  # of a record


class BaseTraits(NamedTuple):
    """What `measure_base` found."""

    packing: bool
    """Whether records that share a row, with positions that restart, are kept apart."""
    embedding_scale: float
    """The factor by which the embedding multiplies its rows."""


def measure_base(base: PreTrainedModel) -> BaseTraits:
    """Run a base on rows of a few ids, and return what it does; on the device "meta", what an ordinary one does.

    Raises ValueError, naming the difference, unless

    - its head is a matrix of the width of its embedding, and its embedding a table times a constant,
    - its logits are those of its head, and the same of embeddings as of ids,
    - ids of rows that are padded on the left and then appended one by one give the logits of the whole row.
    """
    embedding, _ = check_parts(base)
    if embedding.weight.device.type == "meta":
        return BaseTraits(True, 1.0)
    with torch.no_grad(), _in_mode(base, training=False):
        scale = embedding_scale(embedding)
        try:
            own = base(input_ids=_text_ids(embedding)[None], use_cache=False).logits[0]
            if not own.isfinite().all():  # a damaged base is reported where its text is scored
                return BaseTraits(True, scale)
            packing = _check_logits(base, own)
            _check_cache(base, own[-1])
        except _RefusedError:
            raise
        except Exception as error:  # each architecture raises classes of its own
            raise _failed(base, error) from error
    return BaseTraits(packing, scale)


@torch.no_grad()
def embedding_scale(embedding: nn.Module) -> float:
    """Return the factor by which an embedding multiplies the rows of its table. Raises ValueError if it does anything else."""
    ids = _text_ids(embedding)
    rows, embedded = embedding.weight[ids], embedding(ids)
    if torch.equal(rows, embedded):
        return 1.0
    scale = (embedded.double() * rows.double()).sum() / rows.double().square().sum().clamp_min(1e-30)
    if embedded.shape != rows.shape or not _equal(embedded, rows.double() * scale):
        raise ValueError(
            f"the embedding of the base model ({type(embedding).__name__}) does more than to multiply its rows by a constant, and "
            f"codes would lack it: {_REMEDY}"
        )
    return scale.item()


@torch.no_grad()
def hidden_norm(base: PreTrainedModel) -> Tensor:
    """Return the average norm of the hidden states that a base's head gets, of some text ids; float32 scalar."""
    if base.device.type == "meta":  # no values
        return torch.zeros((), device="meta")
    ids = torch.arange(min(64, base.config.vocab_size, positions_of(base.config)), device=base.device)
    norm = base.base_model(input_ids=ids[None], use_cache=False).last_hidden_state.float().norm(dim=-1).mean()
    return norm.nan_to_num(0.0, 0.0)  # a damaged base is reported where its text is scored


@torch.no_grad()
def linear_layers(base: PreTrainedModel) -> list[str]:
    """Return the last names of the linear layers that see each position of a row once; the head is none of them.

    Left out are layers that compute something else, as quantized ones, and those whose weights are read without calling them, as by
    fused kernels of state-space models: an update of such a layer would have no effect.
    """
    head, ids = base.get_output_embeddings(), torch.zeros(2, _IDS, dtype=torch.int64, device=base.device)
    found = {name: layer for name, layer in base.named_modules() if isinstance(layer, nn.Linear) and layer is not head}
    plain: dict[str, bool] = {}

    def note(name: str, layer: nn.Linear, x: Tensor, out: Tensor) -> None:
        every = x[..., 0].numel() == ids.numel() and _equal(out, F.linear(x, layer.weight, layer.bias))
        plain[name] = plain.get(name, True) and every

    hooks = [
        layer.register_forward_hook(lambda layer, inputs, out, name=name: note(name, layer, inputs[0], out))
        for name, layer in found.items()
    ]
    devices = [base.device] if base.device.type == "cuda" else []
    try:
        # In training, since kernels differ there; dropout must not change the random numbers of the caller.
        with torch.random.fork_rng(devices), _in_mode(base, training=True):
            base.base_model(inputs_embeds=base.get_input_embeddings()(ids), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    last: dict[str, bool] = {}
    for name in found:
        kind = name.rpartition(".")[2]
        last[kind] = last.get(kind, True) and plain.get(name, False)
    return [kind for kind, works in last.items() if works]


def check_parts(base: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """Return the embedding and the head."""
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is None or embedding is None or head.weight.shape[-1] != embedding.weight.shape[-1]:
        raise ValueError(
            f"the base model ({type(base).__name__}) has no language-model head of the width of its embedding: load "
            "a Llama, Qwen, Mistral or SmolLM with AutoModelForCausalLM"
        )
    if getattr(head, "bias", None) is not None:
        raise ValueError(
            f"the head of a {base.config.model_type} has a bias, which codes would not have: take a Llama, Qwen, Mistral "
            "or SmolLM"
        )
    return embedding, head


def _check_logits(base: PreTrainedModel, own: Tensor) -> bool:
    """Compare the base's own logits (S, V) of a text with those of its decoder and head; return whether packing keeps records apart."""
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    ids = _text_ids(embedding)
    text = embedding(ids[None])[0]
    # Two records that share rows with the text, of embeddings that are no row of the table, as those of codes.
    others = (text + text.roll(1, 0)) / 2, (text.flip(0) + text.roll(2, 0)) / 2
    rows = torch.stack([torch.cat([other, text]) for other in others])
    positions = torch.arange(_IDS, device=ids.device).repeat(2, 2)
    packed = _decode(base, rows, positions)[:, _IDS:] @ head.weight.T
    if _equal(packed[0], own):
        return _equal(packed[0], packed[1], exact=True)
    states = _decode(base, text[None], positions[:1, :_IDS])[0]
    if _equal(alone := states @ head.weight.T, own):
        return False
    if not _equal(states, base.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]):
        raise _refused(base, "computes something else from embeddings than from ids")
    if not _equal(alone, head(states)):
        raise _refused(base, "has a head that is more than a matrix, which code logits would lack")
    gap = f"by up to {_gap(alone, own):.2g}, where the largest is {own.abs().max():.2g}"
    raise _refused(base, f"changes its logits after the head ({gap})")


def _check_cache(base: PreTrainedModel, last: Tensor) -> None:
    """Compare the last logits (V,) of a text with those of the same text in a padded row whose last id is appended to a cache."""
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    ids, padding = _text_ids(embedding), 1
    length = padding + _IDS
    cache = StaticCache(config=base.config, max_cache_len=length)
    mask = (torch.arange(length, device=ids.device) >= padding).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    rows = embedding(F.pad(ids, (padding, 0))[None])
    for part in (slice(0, length - 1), slice(length - 1, length)):
        out = base.base_model(
            inputs_embeds=rows[:, part],
            attention_mask=mask[:, : part.stop],
            position_ids=positions[:, part],
            past_key_values=cache,
            use_cache=True,
        )
    if not _equal(out.last_hidden_state[0, -1] @ head.weight.T, last):
        raise _refused(base, "gives other logits with a cache and padding on the left than without")


def _decode(base: PreTrainedModel, embeddings: Tensor, positions: Tensor) -> Tensor:
    """Embeddings (R, S, H) -> hidden states (R, S, H), as `LarpMllmForCausalLM.forward` computes them."""
    out = base.base_model(
        inputs_embeds=embeddings, attention_mask=None, position_ids=positions, past_key_values=None, use_cache=False
    )
    if "past_key_values" not in type(out).__dataclass_fields__:
        raise _refused(base, "keeps its state in another way than as past_key_values, and could not generate")
    return out.last_hidden_state


def _text_ids(embedding: nn.Module) -> Tensor:
    """Return ids (_IDS,) from all over the vocabulary; the last rows may be padding, the first are often control tokens."""
    rows = embedding.weight.shape[0]
    return torch.linspace(rows // 8, rows // 2, _IDS, device=embedding.weight.device).round().long()


def _equal(a: Tensor, b: Tensor, exact: bool = False) -> bool:
    """Whether two results agree but for rounding; exact: two rows of one computation, which round alike."""
    tolerance = 1e-4 if exact else 0.3 if a.dtype in (torch.float16, torch.bfloat16) else 1e-3
    return _gap(a, b) <= tolerance * b.abs().max().item()


def _gap(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


class _RefusedError(ValueError):
    """The error of a base that does something else than ours would."""


def _refused(base: PreTrainedModel, what: str) -> _RefusedError:
    return _RefusedError(f"the base model ({type(base).__name__}) {what}: {_REMEDY}")


def _failed(base: PreTrainedModel, error: Exception) -> _RefusedError:
    reason = (str(error).strip().splitlines() or [""])[0][:160].rstrip(".")
    return _refused(base, f"cannot run on embeddings with a cache ({type(error).__name__}: {reason})")


@contextmanager
def _in_mode(base: nn.Module, training: bool) -> Iterator[None]:
    """In the block, a model is in training or evaluation mode; then each of its modules is as it was."""
    modes = [(module, module.training) for module in base.modules()]
    base.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
