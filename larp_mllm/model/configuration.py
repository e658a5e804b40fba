"""LarpMllmConfig: what a language model with video vocabulary is made of, checked when it is built and when it is loaded."""

import math
from typing import Any, ClassVar, Literal, get_args

from larp_mllm.locate import MODEL_TYPE
from larp_mllm.model.vocabulary import Vocabulary

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

AdapterKind = Literal["codebook", "free"]
# What some bases do to their logits after the head: theirs would differ from ours. With the value that does nothing.
_AFTER_THE_HEAD = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}


class LarpMllmConfig(PreTrainedConfig):
    """The base model's config (`text_config`), the id layout, and what the video tokenizer must be.

    `text_size` is the first id that is not text (see Vocabulary), `code_dim` the width of the codebook,
    `video_tokenizer_hash` the weight hash of the LARP tokenizer whose codes the model speaks, `fps` and `frame_stride`
    describe the clips it was trained on, `given_frames` how many frames it was given to continue from (0: it was not
    trained to continue videos). Raises ValueError for values that cannot be, by construction and when it is loaded.
    """

    model_type = MODEL_TYPE
    sub_configs: ClassVar = {"text_config": AutoConfig}

    text_config: Any = None
    text_size: int = 0
    codebook_size: int = 0
    code_dim: int = 0
    tokens_per_video: int = 0
    adapter: str = "codebook"
    video_tokenizer_hash: str = ""
    fps: float = 8.0
    frame_stride: int = 1
    given_frames: int = 0

    def __post_init__(self, **kwargs):
        if not isinstance(self.text_config, PreTrainedConfig):  # older releases leave what config.json holds as it is
            text = {} if self.text_config is None else dict(self.text_config)
            self.text_config = CONFIG_MAPPING[text.get("model_type", "qwen2")](**text)
        super().__post_init__(**kwargs)
        # 0 is the library's own doing: it makes a config without arguments to find what differs from it when saving.
        if self.text_size or self.codebook_size:
            self._check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """The config that a config.json holds; ValueError where it is none, which names the field."""
        text = config_dict.get("text_config")
        kind = text.get("model_type") if isinstance(text, dict) else None
        if kind is not None and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
            raise ValueError(
                f"config.json of a {MODEL_TYPE} model: text_config has the model_type {kind!r}, which this version of "
                "transformers does not know: copy the model folder again, or update transformers"
            )
        try:
            return super().from_dict(config_dict, **kwargs)
        except (StrictDataclassError, AttributeError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"config.json of a {MODEL_TYPE} model: {reason}; copy the model folder again") from error

    @classmethod
    def default_config_fields(cls) -> dict[str, Any]:
        """What newer releases ask before they save: that text_config is a config, of which defaults are left out."""
        return {**super().default_config_fields(), "text_config": {}}

    @property
    def vocabulary(self) -> Vocabulary:
        """The id layout that this config records."""
        return Vocabulary(self.text_size, self.codebook_size, self.tokens_per_video)

    @property
    def vocab_size(self) -> int:
        """The number of all ids, those of videos included; that of the base is `text_config.vocab_size`."""
        return self.vocabulary.size if self.text_size else 0  # 0: the config without arguments, see __post_init__

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
            _check_number(name, getattr(self, name), 1)
        _check_number("given_frames", self.given_frames, 0)
        if isinstance(self.fps, bool) or not (
            isinstance(self.fps, (int, float)) and math.isfinite(self.fps) and self.fps > 0
        ):
            raise ValueError(f"config.json: fps must be a number above 0, got {self.fps!r}")
        rows = self.text_config.vocab_size
        if self.text_size < rows:
            raise ValueError(
                f"config.json: text_size is {self.text_size}, below the base model's {rows} embedding rows: codes would "
                "be read as text. Restore the config.json that was written with the weights"
            )
        if self.adapter not in get_args(AdapterKind):
            raise ValueError(f"adapter must be one of {', '.join(get_args(AdapterKind))}, got {self.adapter!r}")
        for name, nothing in _AFTER_THE_HEAD.items():
            if getattr(self.text_config, name, nothing) not in (None, nothing):
                raise ValueError(
                    f"the base model ({self.text_config.model_type}) changes its logits after the head ({name} = "
                    f"{getattr(self.text_config, name)}), which is not supported: take a Llama, Qwen, Mistral or SmolLM"
                )


def _check_number(name: str, value: int, lowest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
        raise ValueError(
            f"config.json: {name} must be a whole number of at least {lowest}, got {value!r}: restore the config.json that was written with "
            "the weights"
        )


AutoConfig.register(LarpMllmConfig.model_type, LarpMllmConfig)
