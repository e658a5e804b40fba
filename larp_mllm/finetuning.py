"""What of the model is trained, and at which rate; assembled by training/train_mllm.py."""

from typing import Literal

from larp_mllm.modeling import LarpMllmForCausalLM

import torch
from torch import nn

TrainedPart = Literal["adapter", "lora", "full"]
# The projections of attention and MLP, by the names that Llama, Qwen, Mistral and their kin share.
LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def prepare(model: LarpMllmForCausalLM, part: TrainedPart, lora_rank: int):
    """Freeze what is not trained; returns peft's LoraModel (its layers sit inside `model.base`) or None.

    adapter: the base keeps its weights and its text logits. lora: low-rank updates beside its projections. full: all.
    """
    if part == "full":
        return None
    model.base.requires_grad_(False)
    if part == "adapter":
        return None
    from peft import LoraConfig, LoraModel

    settings = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=LORA_LAYERS)
    return LoraModel(model.base, settings, "default")


def optimizer(model: LarpMllmForCausalLM, adapter_lr: float, llm_lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with a learning rate for the adapter and one for the language model; only matrices decay.

    Norms, biases and tables of embeddings do not: a row that is rarely seen would fade.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups = []
    for part, rate in ((model.adapter, adapter_lr), (model.base, llm_lr)):
        trained = [p for p in part.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim > 1 and id(p) not in tables]
        others = [p for p in trained if p.ndim < 2 or id(p) in tables]
        groups.append({"params": matrices, "lr": rate, "weight_decay": weight_decay})
        groups.append({"params": others, "lr": rate, "weight_decay": 0.0})
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95))
