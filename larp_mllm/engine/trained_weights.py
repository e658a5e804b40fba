"""The weights of a model in training: where they start from, their optimizer, and the model that is written."""

from pathlib import Path
from typing import Any

from larp.engine.checkpoint import differences
from larp.engine.distributed import Ranks, barrier, gathered_weights
from larp.files import replacing_folder
from larp_mllm.engine.lora import merged_weights
from larp_mllm.locate import find_model, is_shipped
from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.model.weights import naming_unwritable, not_finite
from larp_mllm.pipeline import Mllm
from larp_mllm.processing.processor import VIDEO_TOKENIZER, LarpMllmProcessor, text_tokenizer_hash

import torch
from safetensors import safe_open
from torch import nn

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


def load_start(source: str) -> Mllm:
    """Load the trained model that a run begins with, on the CPU.

    source: model folder, run folder, hub name or the name of a model that comes with the package. Raises ValueError if it holds no model, or one without its video tokenizer.
    """
    folder = find_model(source, option="--start-from")
    if not (folder / VIDEO_TOKENIZER).is_dir() and not is_shipped(folder):
        raise ValueError(
            f"--start-from {source}: the model in {folder} lacks its {VIDEO_TOKENIZER} folder. Copy it again, or if eval/gpu.py wrote "
            "it, take OUT/weights/mllm after `python eval/gpu.py --unpack-results OUT`"
        )
    return Mllm.load(folder, "cpu")


def take_weights(mllm: Mllm, trained: Mllm, source: str) -> None:
    """Copy the weights of a trained model into a fresh one, except for the codebook of the video tokenizer.

    source: name of the trained model. Raises ValueError if it has another shape or vocabulary.
    """
    if differing := differences(_shape(trained), _shape(mllm)):
        raise ValueError(f"start_from {source} is another model than this run's: {'; '.join(differing)}")
    if (rank := trained.model.config.partial_lora_rank) > 0:
        mllm.model.add_partial_lora(rank, trained.model.config.partial_lora_layers)
    weights = trained.model.state_dict()
    weights["adapter.codebook"] = mllm.model.adapter.codebook
    mllm.model.load_state_dict(weights)


def write_model(
    model: LarpMllmForCausalLM, processor: LarpMllmProcessor, lora: bool, folder: Path, zero_stage: int, ranks: Ranks
) -> None:
    """Write a model in training as a folder that `Mllm.load` reads, replaced as a whole. Collective. ValueError if it cannot be."""
    with gathered_weights(model, zero_stage):
        if ranks.is_main:
            with naming_unwritable(folder), replacing_folder(folder) as part:
                model.save_pretrained(part, state_dict=merged_weights(model) if lora else model.state_dict())
                processor.save_pretrained(part)
    barrier()


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
        **{
            name: getattr(config, name)
            for name in ("adapter", "residual_rank", "codebook_size", "code_dim", "tokens_per_video")
        },
        "text_tokenizer": text_tokenizer_hash(mllm.processor.tokenizer)[:16],
    }
