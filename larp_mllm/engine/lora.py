"""LoRA on the language model: which weights are trained, and the updates merged into the base."""

from typing import Literal

from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.model.partial_lora import PartialLoraLinear, layers_named, no_layers
from larp_mllm.model.probe import linear_layers

import torch
from torch import Tensor

Method = Literal["partial-lora", "lora", "full"]
TrainedPart = Literal["adapter", "partial-lora", "lora", "full"]
_LORA = "default"
# peft refuses it in these models, whose fused kernels read its weight without calling it.
_WITHOUT_OUT_PROJ = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def prepare_training(model: LarpMllmForCausalLM, part: TrainedPart, lora_rank: int = 32, lora_alpha: int | None = None):
    """Freeze what is not trained and add LoRA; returns peft's LoraModel, whose layers are inside `model.base`, or None.

    Args:
        part: "adapter": the base stays frozen. "partial-lora": adapter, and low-rank updates of the base's linear layers at the
            positions of video ids. "lora": the updates act everywhere. "full": all.
        lora_alpha: with "lora", the updates are scaled by lora_alpha / lora_rank; by default 2 * lora_rank.

    Raises ValueError for a base without linear layers, and for a model with partial LoRA of another rank or another `part`.
    """
    if part == "full":
        return None
    model.base.requires_grad_(False)
    if part == "adapter":
        return None
    if part == "partial-lora":
        model.add_partial_lora(lora_rank)
        for layer in model.base.modules():
            if isinstance(layer, PartialLoraLinear):
                layer.lora_down.requires_grad_(True)
                layer.lora_up.requires_grad_(True)
        return None
    if model.config.partial_lora_rank:
        raise ValueError(
            "this model has partial LoRA already, to which LoRA cannot be added: train it with --joint.method partial-lora"
        )
    from peft import LoraConfig, LoraModel
    from peft.tuners.lora.layer import ParamWrapper

    alpha = 2 * lora_rank if lora_alpha is None else lora_alpha
    layers = linear_layers(model.base)
    if model.config.text_config.model_type in _WITHOUT_OUT_PROJ:
        layers = [name for name in layers if name != "out_proj"]
    if not layers:
        raise no_layers(model.base)
    found = [name for name, _ in layers_named(model.base, layers)]
    lora = LoraModel(model.base, LoraConfig(r=lora_rank, lora_alpha=alpha, target_modules=found), _LORA)
    if any(isinstance(layer, ParamWrapper) for layer in model.base.modules()):
        raise ValueError(
            f"peft would train the experts of this base ({type(model.base).__name__}) as well, and cannot merge them one by one: "
            "give --joint.method partial-lora or full"
        )
    return lora


def updated_layers(model: LarpMllmForCausalLM) -> list[str]:
    """Return the last names of the layers of the base that have low-rank updates."""
    names = (
        name for name, layer in model.base.named_modules() if hasattr(layer, "lora_down") or hasattr(layer, "lora_A")
    )
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


@torch.no_grad()
def merged_weights(model: LarpMllmForCausalLM) -> dict[str, Tensor]:
    """Return the state dict with LoRA merged into the base; the model is not changed.

    Tensors without LoRA are shared with the model, not copied.
    """
    from peft.tuners.lora import LoraLayer

    weights = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            update = layer.get_delta_weight(_LORA)
            weights[f"{name}.base_layer.weight"] = layer.base_layer.weight + update.to(layer.base_layer.weight)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in weights.items()}
