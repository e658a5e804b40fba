"""Checks that a text tokenizer and a LARP tokenizer are those that a language model was trained with."""

import hashlib
import json
from pathlib import Path

from larp.models.tokenizer import LarpTokenizer
from larp_mllm.locate import first_line
from larp_mllm.model.configuration import LarpMllmConfig

from transformers import AutoTokenizer


def load_text_tokenizer(folder: Path):
    """Load the text tokenizer of a model folder without running code in it. Raises ValueError if it is damaged."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise classes of their own
        state = "is damaged" if (folder / "tokenizer.json").is_file() else "is missing"
        raise ValueError(
            f"{folder}: the text tokenizer cannot be loaded, tokenizer.json {state}: copy the model folder again, "
            f"or take the file from the base model ({first_line(error)})"
        ) from error


def text_tokenizer_hash(tokenizer) -> str:
    """SHA-256 (hex) of the vocabulary of a text tokenizer with its ids."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def check_tokenizers(config: LarpMllmConfig, tokenizer, video_tokenizer: LarpTokenizer, where: str) -> None:
    """Raise ValueError unless both tokenizers are those that the model's config records."""
    expected = max(config.base_rows, len(tokenizer))
    if config.text_size != expected:
        raise ValueError(
            f"{where}: the model's text ids end at {config.text_size}, but its base and tokenizer make {expected}; "
            "the tokenizer files are not those the model was trained with: restore them"
        )
    _check_hash(config.video_tokenizer_hash, video_tokenizer, where, "config.json")
    frames = video_tokenizer.config.num_frames
    if config.given_frames >= frames:
        raise ValueError(
            f"{where}: config.json says given_frames = {config.given_frames}, but a clip of the video tokenizer has {frames} "
            "frames, and none would be left to sample: restore the config.json that was written with the weights"
        )


def check_saved(saved: dict, tokenizer, video_tokenizer: LarpTokenizer, where: str) -> None:
    """Raise ValueError unless both tokenizers are those that processor_config.json records."""
    file, found = "processor_config.json", text_tokenizer_hash(tokenizer)
    if found != _recorded(saved.get("text_tokenizer_hash"), "text_tokenizer_hash", found, where, file):
        raise ValueError(
            f"{where}: the vocabulary of the text tokenizer is not the one that {file} records; the tokenizer files are "
            "not those the model was trained with: restore them"
        )
    _check_hash(saved.get("video_tokenizer_hash"), video_tokenizer, where, file)


def _check_hash(recorded: object, video_tokenizer: LarpTokenizer, where: str, file: str) -> None:
    found = video_tokenizer.weight_hash()
    recorded = _recorded(recorded, "video_tokenizer_hash", found, where, file)
    if found != recorded:
        raise ValueError(
            f"{where}: the video tokenizer has weight hash {found[:12]}, the model was trained with {recorded[:12]}: its "
            "codes would mean something else. Restore that one"
        )


def _recorded(value: object, name: str, found: str, where: str, file: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(
            f"{where}: {file} does not record {name}, so the tokenizer cannot be checked: copy the model folder again, or, if "
            f'it is the one the model was trained with, write "{name}": "{found}" into {file}'
        )
    return value
