"""The published LARP checkpoint layout, translated to ours (hub repositories hywang66/LARP-L-long-*)."""

from larp.discriminator import DiscriminatorConfig
from larp.hub import CheckpointError
from larp.prior import PRIOR_SIZES, PriorConfig
from larp.tokenizer import TokenizerConfig

import torch
from torch import Tensor

RENAMED = {
    "bottleneck.in_linear": "in_linear",
    "bottleneck.out_linear": "out_linear",
    "bottleneck.regularizer.embedding": "quantizer.embedding",
    "decoder_latent_pe": "latent_positions",
    "decoder_patch_query_embed": "decoder_positions",
    "decoder_patch_query_token_type_embed": "patch_type",
    "encoder_patch_pe": "encoder_positions",
    "encoder_latent_query_embed": "queries",
    "x_embedder.proj": "x_embedder",
    "final_layer.linear": "head",
    "final_layer.norm_final": "norm_final",
    "prior_model": "prior",
}
RENAMED_IN_PRIOR = {".ln1.": ".norm1.", ".ln2.": ".norm2.", ".mlp.0.": ".mlp.fc1.", ".mlp.2.": ".mlp.fc2."}
# Fields that would change the mathematics; any other value is a model that this code does not build.
FIXED = {
    "learned_encoder_patch_pe": False,
    "learned_decoder_latent_pe": False,
    "learned_decoder_patch_query_embed": False,
    "learned_encoder_latent_query_embed": True,
    "use_decoder_patch_query_token_type_embed": True,
    "use_decoder_latent_token_type_embed": False,
    "use_encoder_latent_query_token_type_embed": False,
    "use_encoder_patch_token_type_embed": False,
    "in_channels": 3,
}


def tokenizer_from_published(config: dict, tensors: dict[str, Tensor]) -> tuple[TokenizerConfig, dict[str, Tensor]]:
    """Translate a published tokenizer; raises CheckpointError that names the field which is absent or not supported."""
    try:
        return tokenizer_config(config), tokenizer_tensors(tensors)
    except KeyError as error:
        raise CheckpointError(f"this is no LARP tokenizer checkpoint: {error.args[0]!r} is missing") from error


def tokenizer_config(config: dict) -> TokenizerConfig:
    """Read the nested published config; numbers written as strings are cast."""
    for name, expected in FIXED.items():
        if config.get(name, expected) != expected:
            raise CheckpointError(
                f"published config field {name} = {config[name]!r} is not supported (only {expected!r})"
            )
    bottleneck = config["bottleneck"]["args"]
    quantizer = bottleneck["regularizer"]["args"]
    prior = config.get("prior_model") or {}
    size = str(prior.get("name", "")).removeprefix("gptc-")
    if prior and size not in PRIOR_SIZES:
        raise CheckpointError(
            f"prior_model.name {prior.get('name')!r} is unknown; known: {', '.join('gptc-' + s for s in PRIOR_SIZES)}"
        )
    depth, heads, width = PRIOR_SIZES[size or "S"]
    patch = int(config["patch_size"])
    frames = int(config["temporal_patch_size"])
    out_patch = int(config.get("decoder_patch_size") or patch)
    out_frames = int(config.get("decoder_temporal_patch_size") or frames)
    return TokenizerConfig(
        num_frames=int(config["frame_num"]),
        height=int(config["input_size"]),
        width=int(config["input_size"]),
        patch_size=(frames, patch, patch),
        decoder_patch_size=None if (out_frames, out_patch) == (frames, patch) else (out_frames, out_patch, out_patch),
        num_tokens=int(config["bottleneck_token_num"]),
        codebook_size=int(quantizer["codebook_size"]),
        code_dim=int(bottleneck["bottleneck_dim"]),
        encoder_width=int(config["encoder_hidden_size"]),
        encoder_depth=int(config["encoder_depth"]),
        encoder_heads=int(config["encoder_num_heads"]),
        decoder_width=int(config["decoder_hidden_size"]),
        decoder_depth=int(config["decoder_depth"]),
        decoder_heads=int(config["decoder_num_heads"]),
        stochastic=bool(quantizer["stochastic"]),
        temperature=float(quantizer["stochastic_temperature"]),
        prior=PriorConfig(
            enabled=bool(prior),
            depth=depth,
            heads=heads,
            width=width,
            dropout=0.0 if prior.get("no_dropout") else 0.1,
            rounds=int(prior.get("n_rounds", 2)),
            temperature=float(prior.get("latent_ce_temperature", 1.0)),
        ),
    )


def tokenizer_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the published tensors and fuse the prior's query, key and value."""
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in RENAMED.items():
            if name == old or name.startswith(old + "."):
                name = new + name[len(old) :]
                break
        if name.startswith("prior."):
            for old, new in RENAMED_IN_PRIOR.items():
                name = name.replace(old, new)
        renamed[name] = tensor
    for name in [n for n in renamed if ".attn.query." in n]:
        parts = [renamed.pop(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        renamed[name.replace(".query.", ".qkv.")] = torch.cat(parts)
    return renamed


def discriminator_from_published(
    config: dict, tensors: dict[str, Tensor]
) -> tuple[DiscriminatorConfig, dict[str, Tensor]]:
    """Translate a discriminator of the reference."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace("transformer_encoder.", "encoder.").replace("x_embedder.proj.", "x_embedder.")
        renamed["positions" if name == "encoder_pos_embed" else name] = tensor
    patch = int(config["patch_size"])
    settings = DiscriminatorConfig(
        num_frames=int(config["frame_num"]),
        height=int(config["input_size"]),
        width=int(config["input_size"]),
        patch_size=(int(config["temporal_patch_size"]), patch, patch),
        hidden=int(config["hidden_size"]),
        depth=int(config["n_layers"]),
        heads=int(config["n_heads"]),
    )
    return settings, renamed
