"""LarpMllmConfig: the configuration of a language model with video vocabulary."""

import math
import sys
from copy import copy, deepcopy
from typing import Any, ClassVar, Literal, get_args

from larp_mllm.locate import MODEL_TYPE
from larp_mllm.model.partial_lora import PROJECTIONS
from larp_mllm.model.vocabulary import Vocabulary

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

AdapterKind = Literal["codebook", "free"]
# Options of bases that transform logits after the head, which code logits would lack -> the value that is neutral.
_LOGIT_TRANSFORMS = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}


class LarpMllmConfig(PreTrainedConfig):
    """The base model's config, the id layout, and the video tokenizer that belongs to the model.

    Args:
        text_config: config of the base model. Its vocab_size becomes that of all ids, the width of the logits, for which
            transformers asks it; `base_config` has that of the base, and so has config.json.
        text_size: the first id that is not text, see `Vocabulary`.
        codebook_size: number of codes K.
        code_dim: width of the codebook.
        tokens_per_video: number of codes N of a video.
        adapter: "codebook" or "free", see `TokenAdapter`.
        residual_rank: of the adapter "codebook", see `CodebookRows`; 0 for models of earlier versions.
        video_tokenizer_hash: weight hash of the LARP tokenizer that the model was trained with.
        fps: frames per second of the training clips.
        frame_stride: step between the frames that are read from a video file.
        given_frames: number of frames that a continuation starts from; 0: the model is not trained for continuation.
        partial_lora_rank: rank of the base's updates at positions of video ids, see `PartialLoraLinear`; 0: there are none.
        partial_lora_layers: the last names of the layers that have these updates.
        packing: whether the base keeps records apart that share a row, see `measure_base`.
        embedding_scale: the factor by which the base multiplies the rows of its embedding, and so those of video ids.

    Raises ValueError, when built and when loaded, for values out of range.
    """

    model_type = MODEL_TYPE
    sub_configs: ClassVar = {"text_config": AutoConfig}
    # TRL reads it of every model that is not part of transformers.
    auto_map: ClassVar = {}

    text_config: Any = None
    text_size: int = 0
    codebook_size: int = 0
    code_dim: int = 0
    tokens_per_video: int = 0
    adapter: str = "codebook"
    residual_rank: int = 0
    video_tokenizer_hash: str = ""
    fps: float = 8.0
    frame_stride: int = 1
    given_frames: int = 0
    partial_lora_rank: int = 0
    partial_lora_layers: Any = PROJECTIONS
    packing: bool = True
    embedding_scale: float = 1.0

    def __post_init__(self, **kwargs):
        if not isinstance(self.text_config, PreTrainedConfig):  # older releases leave a dict
            text = {} if self.text_config is None else dict(self.text_config)
            self.text_config = CONFIG_MAPPING[text.get("model_type", "qwen2")](**text)
        super().__post_init__(**kwargs)
        self.base_rows = self.text_config.vocab_size
        # transformers builds a config without arguments to save only what differs from it.
        if self.text_size or self.codebook_size:
            self._check()
            self.text_config = copy(self.text_config)
            self.text_config.vocab_size = self.vocab_size

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """The config that a config.json holds. Raises ValueError, naming the field, if it is damaged."""
        text = config_dict.get("text_config")
        kind = text.get("model_type") if isinstance(text, dict) else None
        if kind is not None and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
            raise ValueError(
                f"config.json of a {MODEL_TYPE} model: text_config has the model_type {kind!r}, which this version of "
                "transformers does not know: copy the model folder again, or update transformers"
            )
        try:
            return super().from_dict(config_dict, **kwargs)
        except (StrictDataclassError, AttributeError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"config.json of a {MODEL_TYPE} model: {reason}; copy the model folder again") from error

    @classmethod
    def default_config_fields(cls) -> dict[str, Any]:
        """Tells newer releases of transformers that text_config is a config, so that they save it without its defaults."""
        return {**super().default_config_fields(), "text_config": {}}

    @property
    def vocabulary(self) -> Vocabulary:
        """The id layout."""
        return Vocabulary(self.text_size, self.codebook_size, self.tokens_per_video)

    @property
    def base_config(self) -> PreTrainedConfig:
        """A copy of the base's config as it is: its vocab_size is the number of rows of its embedding."""
        base = deepcopy(self.text_config)
        base.vocab_size = self.base_rows
        return base

    def to_dict(self) -> dict[str, Any]:
        """The fields of config.json."""
        fields = super().to_dict()
        fields["text_config"]["vocab_size"] = fields.pop("base_rows")
        return fields

    @property
    def vocab_size(self) -> int:
        """The number of all ids, video ids included; that of the base is `base_rows`."""
        return self.vocabulary.size if self.text_size else 0  # 0: built without arguments, see __post_init__

    @property
    def image_token_id(self) -> int:
        """There is none: raises AttributeError, which trainers of TRL that generate meet with a processor."""
        raise AttributeError(
            "a model with video ids has no image_token_id: give GRPO and other trainers that generate processing_class=processor.tokenizer"
        )

    @property
    def positions(self) -> int:
        """The largest number of ids of a row, see `positions_of`."""
        return positions_of(self.text_config)

    @property
    def hidden_size(self) -> int:
        """The width of the base model."""
        return self.text_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """The number of layers of the base model."""
        return self.text_config.num_hidden_layers

    def _check(self) -> None:
        for name in ("text_size", "codebook_size", "code_dim", "tokens_per_video", "frame_stride"):
            _check_int(name, getattr(self, name), 1)
        for name in ("given_frames", "partial_lora_rank", "residual_rank"):
            _check_int(name, getattr(self, name), 0)
        for name in ("fps", "embedding_scale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ValueError(f"config.json: {name} must be a number above 0, got {value!r}")
        layers = self.partial_lora_layers
        if not isinstance(layers, list | tuple) or not all(isinstance(name, str) for name in layers):
            raise ValueError(f"config.json: partial_lora_layers must be a list of names, got {layers!r}")
        if not isinstance(self.packing, bool):
            raise ValueError(f"config.json: packing must be true or false, got {self.packing!r}")
        rows = self.base_rows
        if self.text_size < rows:
            raise ValueError(
                f"config.json: text_size is {self.text_size}, below the base model's {rows} embedding rows: codes would "
                "be read as text. Restore the config.json that was written with the weights"
            )
        if self.adapter not in get_args(AdapterKind):
            raise ValueError(f"adapter must be one of {', '.join(get_args(AdapterKind))}, got {self.adapter!r}")
        for name, neutral in _LOGIT_TRANSFORMS.items():
            if getattr(self.text_config, name, neutral) not in (None, neutral):
                raise ValueError(
                    f"the base model ({self.text_config.model_type}) changes its logits after the head ({name} = "
                    f"{getattr(self.text_config, name)}), which is not supported: take a Llama, Qwen, Mistral or SmolLM"
                )


def positions_of(config: PreTrainedConfig) -> int:
    """Return the number of positions that the config of a base states; sys.maxsize if it states none, as those without a table do."""
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((positions for positions in found if positions is not None), sys.maxsize)


def _check_int(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"config.json: {name} must be a whole number of at least {least}, got {value!r}: restore the config.json that was written with "
            "the weights"
        )


AutoConfig.register(LarpMllmConfig.model_type, LarpMllmConfig)
