"""Export of a trained model as a stock checkpoint of its base architecture, for transformers, vLLM and others.

The adapter's rows become rows of embedding and head, LoRA is merged, and the text tokenizer gets tokens for the video ids.
Partial LoRA cannot be merged: the checkpoint then has code of its own beside it.
K is the codebook size.
"""

import copy
import json
import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from larp.files import check_writable, obey_umask
from larp.models.tokenizer import LarpTokenizer
from larp_mllm.export import custom_generate
from larp_mllm.export.custom_code import add_custom_code
from larp_mllm.export.readme import readme
from larp_mllm.export.token_names import add_tokens, loader_of
from larp_mllm.locate import read_config
from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.model.partial_lora import add_partial_lora
from larp_mllm.model.probe import embedding_scale
from larp_mllm.model.vocabulary import Vocabulary
from larp_mllm.model.weights import naming_unwritable, quiet
from larp_mllm.processing.chat import stop_ids
from larp_mllm.processing.processor import VIDEO_TOKENIZER, LarpMllmProcessor
from larp_mllm.video import Video

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

if TYPE_CHECKING:
    from larp_mllm.pipeline import Mllm

LAYOUT = "larp.json"
FORMAT = 1


def export(
    model: "Mllm | str | Path",
    to: str | Path,
    *,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a model into the folder `to` as a stock checkpoint and return `to`.

    Args:
        model: loaded, or a name for `Mllm.load`.
        to: written beside this path and renamed when complete.
        overwrite: replace an earlier export; nothing else is ever replaced.
        dtype: of the written weights; by default the model's.
        max_shard_size: of a weight file, as in `PreTrainedModel.save_pretrained`.

    A model with partial LoRA becomes a checkpoint with code of its own, which transformers runs with trust_remote_code=True.
    The logits equal the model's, except for text ids without a row in the base: those are 0, not -inf, and
    generation_config.json suppresses them. Raises ValueError if `to` cannot be written or holds something else.
    """
    to = Path(to).absolute()
    check_target(to, overwrite)
    if isinstance(model, (str, Path)):
        from larp_mllm.pipeline import Mllm

        model = Mllm.load(model, "cpu")
    with naming_unwritable(to):
        to.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
    part = aside / "new"
    try:
        with naming_unwritable(to):
            part.mkdir()
            with quiet():
                _write(model, part, dtype, max_shard_size)
            obey_umask(part)
            check_target(to, overwrite)
            if to.exists():
                # Moved into the folder that is deleted in any case, so that no half of an export is ever left.
                os.replace(to, aside / "old")
            os.replace(part, to)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return to


def read_video_ids(folder: str | Path, ids) -> Video:
    """Decode the ids of one video that an exported model generated, with or without video_start and video_end.

    folder: the export. ids: list or int64 (N,). Raises ValueError if they are not exactly one video.
    """
    layout = read_layout(Path(folder))
    vocabulary = Vocabulary(layout["text_size"], layout["codebook_size"], layout["tokens_per_video"])
    ids = [int(i) for i in ids]
    inner = ids[ids[:1] == [vocabulary.video_start] :]
    inner = inner[: len(inner) - (inner[-1:] == [vocabulary.video_end])]
    if wrong := [i for i in inner if not vocabulary.first_code <= i < vocabulary.size]:
        raise ValueError(
            f"id {wrong[0]} is not a code: the codes of {folder} are the ids {vocabulary.first_code} to {vocabulary.size - 1}. "
            "Allow only those while a video is sampled"
        )
    codes = [vocabulary.id_to_code(i) for i in inner]
    vocabulary.span(codes)
    from larp.data.clips import clip_to_frames

    clip = _video_tokenizer(Path(folder).resolve()).decode(torch.tensor([codes]))[0]
    return Video(clip_to_frames(clip), layout["fps"], codes=tuple(codes))


def _write(mllm: "Mllm", folder: Path, dtype: torch.dtype | None, max_shard_size: int | str) -> None:
    model, processor = mllm.model, mllm.processor
    stock = stock_model(model, dtype)
    tokenizer, words = add_tokens(processor.tokenizer, model.vocabulary, folder)
    layout = {"format": FORMAT, **_layout_of(model, processor, words)}
    layout["tokenizer_class"] = loader_of(tokenizer, folder, stock.config)
    _set_token_ids(stock, processor, layout["missing_text_ids"])
    # What custom_generate reads.
    stock.config.video_start, stock.config.tokens_per_video = layout["video_start"], layout["tokens_per_video"]
    stock.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "custom_generate").mkdir()
    shutil.copyfile(custom_generate.__file__, folder / "custom_generate/generate.py")
    if (rank := model.config.partial_lora_rank) > 0:
        names = model.config.partial_lora_layers
        add_custom_code(folder, type(stock.config).__name__, rank, names, model.vocabulary.video_start)
    processor.video_tokenizer.save_pretrained(folder / VIDEO_TOKENIZER)
    (folder / LAYOUT).write_text(json.dumps(layout, indent=2) + "\n")
    (folder / "README.md").write_text(readme(layout, type(stock).__name__, rank > 0))


@torch.no_grad()
def stock_model(model: LarpMllmForCausalLM, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return the base architecture with text_size + 2 + K rows in embedding and head, untied; other weights are shared.

    Partial LoRA is in its layers, but acts only where `at_positions` says so.
    """
    base, adapter, vocabulary = model.base, model.adapter, model.vocabulary
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    state = _merged(base)
    for module, text, video in (
        # The embedding of the export multiplies all of its rows.
        (base.get_input_embeddings(), embedding, adapter.input_rows() / embedding_scale(base.get_input_embeddings())),
        (base.get_output_embeddings(), head, torch.cat([adapter.control_rows(), adapter.code_rows()])),
    ):
        missing = text.new_zeros(vocabulary.text_size - len(text), text.shape[1])
        state[_name(base, module)] = torch.cat([text, missing, video.to(text)])
    config = copy.deepcopy(base.config)
    config.vocab_size, config.tie_word_embeddings = vocabulary.size, False
    config.dtype = dtype or base.dtype
    with torch.device("meta"):
        stock = type(base)(config)
        if model.config.partial_lora_rank:
            add_partial_lora(stock, model.config.partial_lora_rank, model.config.partial_lora_layers)
    stock.load_state_dict({name: t.detach().to(config.dtype) for name, t in state.items()}, strict=True, assign=True)
    return stock


def _merged(base: nn.Module) -> dict[str, Tensor]:
    """Return the base's state dict with the layers of peft merged into the plain ones."""
    state = dict(base.state_dict())
    for name, layer in base.named_modules():
        if hasattr(layer, "base_layer") and hasattr(layer, "merge"):
            merged = copy.deepcopy(layer)
            if not merged.merged:
                merged.merge()
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
            state |= {f"{name}.{key}": value for key, value in merged.get_base_layer().state_dict().items()}
    return state


def _name(base: nn.Module, module: nn.Module) -> str:
    return next(name for name, candidate in base.named_modules() if candidate is module) + ".weight"


def _set_token_ids(stock: PreTrainedModel, processor: LarpMllmProcessor, missing: list[int]) -> None:
    # The base's own generation_config is not copied: servers would apply its penalties and temperatures to videos.
    bos, eos = processor.layout.bos, processor.layout.eos
    pad = processor.tokenizer.pad_token_id
    stock.config.bos_token_id, stock.config.eos_token_id = bos, eos
    stops = stop_ids(processor.tokenizer)
    stock.generation_config = GenerationConfig(
        bos_token_id=bos,
        eos_token_id=stops or None,
        pad_token_id=pad if pad is not None else eos,
        suppress_tokens=missing or None,
        # A server samples only where the model says so, and applies the temperature of a request only then.
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )


def _layout_of(model: LarpMllmForCausalLM, processor: LarpMllmProcessor, words: dict[str, str]) -> dict:
    vocabulary, config = model.vocabulary, model.config
    return {
        "text_size": vocabulary.text_size,
        "video_start": vocabulary.video_start,
        "video_end": vocabulary.video_end,
        "first_code": vocabulary.first_code,
        "codebook_size": vocabulary.codebook_size,
        "tokens_per_video": vocabulary.tokens_per_video,
        "begin": [] if processor.layout.bos is None else [processor.layout.bos],
        "words": words,
        "missing_text_ids": list(range(model.base.get_input_embeddings().weight.shape[0], vocabulary.text_size)),
        "fps": config.fps,
        "frame_stride": config.frame_stride,
        "given_frames": config.given_frames,
        "video_tokenizer_hash": processor.video_tokenizer.weight_hash(),
    }


def check_target(to: Path, overwrite: bool) -> None:
    """Raise ValueError unless `to` is writable, and new, empty or, with `overwrite`, an earlier export."""
    to = to.absolute()
    check_writable(to.parent / f"{to.name}.new" if to.is_dir() else to)
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return
    if not to.is_dir() or not (to / LAYOUT).is_file():
        raise ValueError(f"{to} exists and is not an earlier export: give a new folder")
    if not overwrite:
        raise ValueError(f"{to} holds an earlier export: give overwrite (--overwrite) to replace it, or a new folder")


def read_layout(folder: Path) -> dict:
    """Return larp.json of an export. Raises ValueError if the folder is none, or of another version."""
    layout = read_config(folder / LAYOUT)
    if layout is None:
        raise ValueError(
            f"{folder} is not an export: {LAYOUT} is missing. Write one with larp-mllm export --to {folder}"
        )
    if layout.get("format") != FORMAT:
        raise ValueError(
            f"{folder / LAYOUT} has format {layout.get('format')}, this version reads {FORMAT}: update larp-mllm"
        )
    return layout


@lru_cache(maxsize=2)
def _video_tokenizer(folder: Path) -> LarpTokenizer:
    return LarpTokenizer.from_pretrained(folder / VIDEO_TOKENIZER)
