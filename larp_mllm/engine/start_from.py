"""A training that begins with the weights of a trained language model with video vocabulary."""

from typing import Any

from larp.engine.state import differences
from larp_mllm.home import find_model
from larp_mllm.mllm import Mllm
from larp_mllm.processing import VIDEO_TOKENIZER, words_hash

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
        "text_tokenizer": words_hash(mllm.processor.tokenizer)[:16],
    }
