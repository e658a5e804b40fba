"""What of the model is trained, and at which rate; and the model that comes of it, with LoRA folded in."""

import shutil
from pathlib import Path
from typing import Any, Literal

from larp.engine.checkpoint import differences
from larp.engine.distributed import Ranks, barrier, whole
from larp_mllm.locate import find_model
from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.model.weights import not_finite
from larp_mllm.pipeline import Mllm
from larp_mllm.processing.processor import VIDEO_TOKENIZER, LarpMllmProcessor, text_tokenizer_hash

import torch
from safetensors import safe_open
from torch import Tensor, nn

Method = Literal["lora", "full"]
TrainedPart = Literal["adapter", "lora", "full"]
# The projections of attention and MLP, by the names that Llama, Qwen, Mistral and their kin share.
LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_LORA = "default"


def prepare(model: LarpMllmForCausalLM, part: TrainedPart, lora_rank: int = 32, lora_alpha: int | None = None):
    """Freeze what is not trained; returns peft's LoraModel (its layers sit inside `model.base`) or None.

    adapter: the base keeps its weights and its text logits. lora: low-rank updates beside its projections, scaled by
    lora_alpha / lora_rank (by default 2). full: all. ValueError for a base without the projections that LoRA knows.
    """
    if part == "full":
        return None
    model.base.requires_grad_(False)
    if part == "adapter":
        return None
    from peft import LoraConfig, LoraModel

    alpha = 2 * lora_rank if lora_alpha is None else lora_alpha
    settings = LoraConfig(r=lora_rank, lora_alpha=alpha, target_modules=LORA_LAYERS)
    try:
        return LoraModel(model.base, settings, _LORA)
    except ValueError as error:
        raise ValueError(
            f"LoRA finds none of the layers {', '.join(LORA_LAYERS)} in this base ({type(model.base).__name__}): train it "
            "with --joint.method full"
        ) from error


def optimizer(model: LarpMllmForCausalLM, adapter_lr: float, llm_lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with a learning rate for the adapter and one for the language model; only matrices decay.

    Norms, biases and tables of embeddings do not: a row that is rarely seen would fade.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups = []
    # The names are those of the metrics: see larp.engine.backend.Engine.learning_rates.
    for name, part, rate in (("adapter_lr", model.adapter, adapter_lr), ("llm_lr", model.base, llm_lr)):
        trained = [p for p in part.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim > 1 and id(p) not in tables]
        others = [p for p in trained if p.ndim < 2 or id(p) in tables]
        groups.append({"params": matrices, "lr": rate, "weight_decay": weight_decay, "lr_name": name})
        groups.append({"params": others, "lr": rate, "weight_decay": 0.0, "lr_name": name})
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95))


@torch.no_grad()
def merged_weights(model: LarpMllmForCausalLM) -> dict[str, Tensor]:
    """The state dict that the model would have with LoRA folded in, and without it; the model stays as it is.

    Tensors that LoRA does not touch are those of the model, not copies.
    """
    from peft.tuners.lora import LoraLayer

    weights = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            update = layer.get_delta_weight(_LORA)
            weights[f"{name}.base_layer.weight"] = layer.base_layer.weight + update.to(layer.base_layer.weight)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in weights.items()}


def write_model(
    model: LarpMllmForCausalLM, processor: LarpMllmProcessor, lora: bool, folder: Path, zero_stage: int, ranks: Ranks
) -> None:
    """Write a folder that `Mllm.load` reads, of a model in training; it is whole or not there. Collective."""
    with whole(model, zero_stage):
        if ranks.is_main:
            part = folder.with_name(f".{folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            model.save_pretrained(part, state_dict=merged_weights(model) if lora else model.state_dict())
            processor.save_pretrained(part)
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
    barrier()


def wrong_tensor(folder: Path) -> str | None:
    """The name of the first tensor of a written model that holds NaN or infinity; they are read one after the other."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if (name := not_finite((name, file.get_tensor(name)) for name in file.keys())) is not None:  # noqa: SIM118
                return name
    return None


# What of a base's config the shapes and the meaning of its weights follow from.
_BASE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)


def take_weights(mllm: Mllm, source: str) -> None:
    """Put the weights of a trained model into a fresh one, which keeps the codebook of its own video tokenizer.

    source: a folder that training wrote (the run folder will do), or a hub name. Raises ValueError that names what differs, or
    says what the folder holds instead.
    """
    folder = find_model(source, option="--start-from")
    if not (folder / VIDEO_TOKENIZER).is_dir():
        raise ValueError(
            f"--start-from {source}: the model in {folder} lacks its {VIDEO_TOKENIZER} folder. Copy it again, or if eval/gpu.py wrote "
            "it, take OUT/weights/mllm after `python eval/gpu.py --unpack-results OUT`"
        )
    trained = Mllm.load(folder, "cpu")
    if differing := differences(_shape(trained), _shape(mllm)):
        raise ValueError(f"start_from {source} is another model than this run's: {'; '.join(differing)}")
    weights = trained.model.state_dict()
    weights["adapter.codebook"] = mllm.model.adapter.codebook
    mllm.model.load_state_dict(weights)


def _shape(mllm: Mllm) -> dict[str, Any]:
    config = mllm.model.config
    return {
        "base": {name: getattr(config.text_config, name, None) for name in _BASE},
        **{name: getattr(config, name) for name in ("adapter", "codebook_size", "code_dim", "tokens_per_video")},
        "text_tokenizer": text_tokenizer_hash(mllm.processor.tokenizer)[:16],
    }
