"""Language models that are stored without their base: what partial LoRA added to it, and which base that is.

    write_without_base("runs/smollm2/model", "adapter", "SmolLM2-135M-Instruct")     # 13 MB of weights in place of 540
    LarpMllmForCausalLM.from_pretrained("adapter")                                    # finds the base, compares it, and adds the rest

In such a folder model.safetensors has the added tensors alone, and base.json says {"base": its name, "sha256": of its weights}.
"""

import hashlib
import shutil
from pathlib import Path

from larp.files import read_json, replacing_folder, write_json
from larp.hub import check_fit
from larp_mllm.model.base_models import ALIASES, FETCHED, load_base
from larp_mllm.model.configuration import LarpMllmConfig
from larp_mllm.model.weights import BASE, WEIGHTS, check_finite, check_folder, naming_unwritable

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedModel


def write_without_base(model: PreTrainedModel, folder: str | Path, to: str | Path, base: str) -> Path:
    """Write a model folder without the weights of the base, and return it; the rest is stored in bfloat16.

    Args:
        model: the model of `folder`, a LarpMllmForCausalLM with partial LoRA.
        folder: where it lies; its other files are copied.
        to: the new folder, replaced as a whole; after an error it is as it was before.
        base: a name for `load_base`, which `to` will be loaded with.

    Raises ValueError if the model has no partial LoRA, and if its base is not `base`, unchanged by the training.
    """
    if not model.config.partial_lora_rank:
        raise ValueError(
            f"{folder} has no partial LoRA, and so is nothing without its base: train it with --joint.method partial-lora"
        )
    digest = base_hash(model.base)
    if base_hash(_load(base, model.config, torch.float32)) != digest:
        raise ValueError(f"the base of {folder} is not {base}: name the one that it was trained with")
    trained = {name for name, _ in model.named_parameters()}  # the codebook is none, and stays exact
    own = {
        name: _half(value) if name in trained else value.cpu().contiguous()
        for name, value in model.state_dict().items()
        if _is_added(name)
    }
    with naming_unwritable(to), replacing_folder(Path(to)) as part:
        shutil.copytree(folder, part, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
        for weights in Path(folder).glob(f"*/{WEIGHTS}"):  # the video tokenizer's
            shutil.copy(weights, part / weights.parent.name)
        save_file(own, part / WEIGHTS, metadata={"format": "pt"})
        (part / WEIGHTS).chmod(0o644)
        write_json(part / BASE, {"base": base, "sha256": digest})
    return Path(to)


def load_with_base(model_class: type[PreTrainedModel], folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """Load what `write_without_base` wrote: the base, and the added tensors; dtype by default float32.

    Raises ValueError if the base cannot be had or has other weights, and for tensors that are missing, unknown or not finite.
    """
    check_folder(model_class, folder)
    saved, config = read_json(folder / BASE), LarpMllmConfig.from_pretrained(folder)
    try:
        name, digest = saved["base"], saved["sha256"]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{folder / BASE} is damaged: copy the model folder again") from error
    base = _load(name, config, dtype or torch.float32)
    if base_hash(base) != digest:
        raise ValueError(
            f"{folder} was trained on another {name} than the one that is found here: fetch it again, or take the model with its base"
        )
    # Without it, transformers resets the base's choice to the slow default.
    config._attn_implementation = base.config._attn_implementation
    model = model_class(config, base)
    model.adapter.to(base.dtype)  # not the model, whose rotary frequencies would be rounded
    expected, found = {name for name in model.state_dict() if _is_added(name)}, load_file(folder / WEIGHTS)
    wrong = [f"{name} is missing" for name in expected - found.keys()]
    wrong += [f"{name} is unknown" for name in found.keys() - expected]
    check_fit(wrong, str(folder))
    model.load_state_dict(found, strict=False)
    check_finite(model, str(folder))
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def base_hash(base: nn.Module) -> str:
    """Return the SHA-256, hex, of a base's weights in bfloat16, whatever they are loaded in, without what partial LoRA added."""
    digest = hashlib.sha256()
    for name, tensor in sorted(base.state_dict().items()):
        if not _is_added(f"base.{name}"):
            digest.update(name.encode())
            digest.update(_half(tensor).flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _load(name: str, config: LarpMllmConfig, dtype: torch.dtype) -> PreTrainedModel:
    package = FETCHED.get(ALIASES.get(name, name))
    if package is not None and getattr(config.text_config, "dequantized_from", None):
        # Trained on the file that is fetched: the hub's, which comes first elsewhere, has other weights.
        if not (files := package.find()):
            raise ValueError(f"this model needs {name}, which is not on this machine: {package.remedy}")
        name = str(files[0])
    return load_base(name, dtype=dtype)[0]


def _is_added(name: str) -> bool:
    return not name.startswith("base.") or name.rpartition(".")[2] in ("lora_down", "lora_up")


def _half(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor).contiguous()
