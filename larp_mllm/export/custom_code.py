"""The Python files that an export of a model with partial LoRA needs beside its weights: no stock architecture has such layers.

transformers runs them with `trust_remote_code=True`, without larp_mllm. Without that option it refuses the folder.
"""

import json
import shutil
from collections.abc import Collection
from pathlib import Path

from larp_mllm.model import partial_lora

MODEL_TYPE = "larp_partial_lora"
_MODULE = "modeling_partial_lora"
_CODE = '''\
"""{architecture} with low-rank updates at the positions of video ids. Written by larp-mllm export."""

from functools import wraps

from .partial_lora import add_partial_lora, at_positions

from transformers import {config}, {architecture}


class PartialLoraConfig({config}):
    model_type = "{model_type}"


class PartialLoraForCausalLM({architecture}):
    config_class = PartialLoraConfig

    def __init__(self, config):
        super().__init__(config)
        add_partial_lora(self, config.partial_lora_rank, config.partial_lora_layers)

    @wraps({architecture}.forward)
    def forward(self, input_ids, **options):
        with at_positions(input_ids >= self.config.first_video_id):
            return super().forward(input_ids=input_ids, **options)
'''


def add_custom_code(folder: Path, config_class: str, rank: int, layers: Collection[str], first_video_id: int) -> None:
    """Write the files into an export whose weights are there, and name them in its config.json.

    config_class: of the architecture, a name in transformers.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (architecture,) = config["architectures"]
    names = {"architecture": architecture, "config": config_class}
    (folder / f"{_MODULE}.py").write_text(_CODE.format(**names, model_type=MODEL_TYPE))
    shutil.copyfile(partial_lora.__file__, folder / "partial_lora.py")
    auto_map = {
        "AutoConfig": f"{_MODULE}.PartialLoraConfig",
        "AutoModelForCausalLM": f"{_MODULE}.PartialLoraForCausalLM",
    }
    config |= {"model_type": MODEL_TYPE, "architectures": ["PartialLoraForCausalLM"], "auto_map": auto_map}
    config |= {"partial_lora_rank": rank, "partial_lora_layers": list(layers), "first_video_id": first_video_id}
    path.write_text(json.dumps(config, indent=2) + "\n")
