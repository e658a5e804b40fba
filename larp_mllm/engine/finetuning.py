"""Which weights of a model are trained and at which rates; where they start from; the model written with LoRA merged."""

import shutil
from pathlib import Path
from typing import Any, Literal

from larp.engine.checkpoint import differences
from larp.engine.distributed import Ranks, barrier, gathered_weights
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
# The projections of attention and MLP, by the names that Llama, Qwen and Mistral share.
LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_LORA = "default"
# The fields of a base's config that decide the shapes and the meaning of its weights.
_BASE_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)


def prepare_training(model: LarpMllmForCausalLM, part: TrainedPart, lora_rank: int = 32, lora_alpha: int | None = None):
    """Freeze what is not trained and add LoRA; returns peft's LoraModel, whose layers are inside `model.base`, or None.

    Args:
        part: "adapter": the base stays frozen. "lora": adapter, and low-rank updates of the base's projections. "full": all.
        lora_alpha: the updates are scaled by lora_alpha / lora_rank; by default 2 * lora_rank.

    Raises ValueError for a base without LORA_LAYERS.
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


def make_optimizer(
    model: LarpMllmForCausalLM, adapter_lr: float, llm_lr: float, weight_decay: float
) -> torch.optim.AdamW:
    """Return AdamW with one learning rate for the adapter and one for the language model.

    Only matrices decay. Norms, biases and embedding tables do not: rows of rare tokens would shrink to zero.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups = []
    # The names are those of the metrics, see larp.engine.backend.Engine.learning_rates.
    for name, part, rate in (("adapter_lr", model.adapter, adapter_lr), ("llm_lr", model.base, llm_lr)):
        trained = [p for p in part.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim > 1 and id(p) not in tables]
        others = [p for p in trained if p.ndim < 2 or id(p) in tables]
        groups.append({"params": matrices, "lr": rate, "weight_decay": weight_decay, "lr_name": name})
        groups.append({"params": others, "lr": rate, "weight_decay": 0.0, "lr_name": name})
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95))


def load_start_weights(mllm: Mllm, source: str) -> None:
    """Copy the weights of a trained model into a fresh one, except for the codebook of the video tokenizer.

    source: model folder, run folder or hub name. Raises ValueError if it holds no model, or one of another shape.
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


def write_model(
    model: LarpMllmForCausalLM, processor: LarpMllmProcessor, lora: bool, folder: Path, zero_stage: int, ranks: Ranks
) -> None:
    """Write a model in training as a folder that `Mllm.load` reads, replaced as a whole. Collective."""
    with gathered_weights(model, zero_stage):
        if ranks.is_main:
            part = folder.with_name(f".{folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            model.save_pretrained(part, state_dict=merged_weights(model) if lora else model.state_dict())
            processor.save_pretrained(part)
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
    barrier()


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


def non_finite_tensor(folder: Path) -> str | None:
    """Return the name of the first tensor of a model folder with NaN or infinity, or None; one is in memory at a time."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if (name := not_finite((name, file.get_tensor(name)) for name in file.keys())) is not None:  # noqa: SIM118
                return name
    return None


def _shape(mllm: Mllm) -> dict[str, Any]:
    config = mllm.model.config
    return {
        "base": {name: getattr(config.text_config, name, None) for name in _BASE_FIELDS},
        **{name: getattr(config, name) for name in ("adapter", "codebook_size", "code_dim", "tokens_per_video")},
        "text_tokenizer": text_tokenizer_hash(mllm.processor.tokenizer)[:16],
    }
