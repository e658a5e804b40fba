"""Conversion of a tokenizer between our layout and the published one (hub repositories hywang66/LARP-L-long-*).

The published layout has the same tensors, including the three fixed position tables, under other names and with separate query,
key and value in the prior.
"""

from larp.hub import CheckpointError
from larp.models.prior import PRIOR_SIZES, PriorConfig
from larp.models.published_fields import (
    add_temporal_axis,
    check_fixed,
    not_representable,
    read_bool,
    read_float,
    read_group,
    read_int,
    remove_temporal_axis,
    rename_prefix,
    warn_of_unknown,
)
from larp.models.tokenizer_config import TokenizerConfig

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

STACK = "transformer_encoder_parallel"

ABSENT = ("", "none", "no", "null")

# Fields that change the computation; this code supports these values only.
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
    "transformer_name": STACK,
    "latent_pe_scale_factor": 10000,
}

FIXED_IN_BOTTLENECK = {"norm": "none"}

FIXED_IN_QUANTIZER = {"l2_normalized": True}

FIXED_IN_PRIOR = {"l2_normalized": True}

# Training and initialisation settings that the published code requires; a trained model does not depend on them.
TRAINING = {"encoder_query_gaussian_init": True, "query_init_std": 0.02}

TRAINING_OF_QUANTIZER = {
    "codebook_loss_weight": 1.0,
    "commitment_loss_weight": 0.25,
    "entropy_loss_temperature": 0.01,
    "entropy_loss_weight": 0.0,
}

TRAINING_OF_PRIOR = {
    "avg_loss_over_rounds": True,
    "mix_ss_max_ratio": 0.5,
    "mix_ss_peak_steps_ratio": 0.3,
    "no_grad_before_last_round": False,
    "use_mix_ss": True,
}

# A config whose published form has every known field.
ALL_FIELDS = TokenizerConfig(num_tokens=16, prior=PriorConfig(positions=16, dropout=0.2))


def tokenizer_from_published(config: dict, tensors: dict[str, Tensor]) -> tuple[TokenizerConfig, dict[str, Tensor]]:
    """Convert a published tokenizer to our layout; CheckpointError names a missing or unsupported field."""
    try:
        return tokenizer_config(config), tokenizer_tensors(tensors)
    except KeyError as error:
        raise CheckpointError(f"not a LARP tokenizer checkpoint: {error.args[0]!r} is missing") from error


def tokenizer_config(config: dict) -> TokenizerConfig:
    """Convert the nested published config; numbers may be written as text."""
    inner, outer = "bottleneck.args.regularizer.", "bottleneck.args."
    bottleneck = read_group(read_group(config, "bottleneck"), "args", "bottleneck.")
    regularizer = read_group(bottleneck, "regularizer", outer)
    quantizer = read_group(regularizer, "args", inner)
    warn_of_unknown(config, published_config(ALL_FIELDS))
    check_fixed(config, FIXED)
    check_fixed(config["bottleneck"], {"name": "bottleneck"}, "bottleneck.")
    check_fixed(bottleneck, FIXED_IN_BOTTLENECK, outer)
    check_fixed(regularizer, {"name": "vq"}, inner)
    check_fixed(quantizer, FIXED_IN_QUANTIZER, inner + "args.")
    for side in ("encoder_name", "decoder_name"):
        if config.get(side) is not None and str(config[side]).lower() not in (*ABSENT, STACK):
            raise CheckpointError(f"published config field {side} = {config[side]!r} is not supported (only {STACK!r})")
    patch, frames = read_int(config, "patch_size"), read_int(config, "temporal_patch_size")
    out_patch = read_int(config, "decoder_patch_size") if config.get("decoder_patch_size") else patch
    out_frames = (
        read_int(config, "decoder_temporal_patch_size") if config.get("decoder_temporal_patch_size") else frames
    )
    return TokenizerConfig(
        num_frames=read_int(config, "frame_num"),
        height=read_int(config, "input_size"),
        width=read_int(config, "input_size"),
        patch_size=(frames, patch, patch),
        decoder_patch_size=None if (out_frames, out_patch) == (frames, patch) else (out_frames, out_patch, out_patch),
        num_tokens=read_int(config, "bottleneck_token_num"),
        codebook_size=read_int(quantizer, "codebook_size", inner + "args."),
        code_dim=read_int(bottleneck, "bottleneck_dim", outer),
        encoder_width=read_int(config, "encoder_hidden_size"),
        encoder_depth=read_int(config, "encoder_depth"),
        encoder_heads=read_int(config, "encoder_num_heads"),
        decoder_width=read_int(config, "decoder_hidden_size"),
        decoder_depth=read_int(config, "decoder_depth"),
        decoder_heads=read_int(config, "decoder_num_heads"),
        stochastic=read_bool(quantizer, "stochastic", inner + "args."),
        temperature=read_float(quantizer, "stochastic_temperature", inner + "args."),
        prior=prior_config(read_group(config, "prior_model") if config.get("prior_model") else {}),
    )


def prior_config(prior: dict) -> PriorConfig:
    """Convert the published settings of the prior; without a name, or with "none", it is disabled."""
    name = str(prior.get("name", ""))
    if name.lower() in ABSENT:
        return PriorConfig(enabled=False)
    if name.removeprefix("gptc-") not in PRIOR_SIZES:
        raise CheckpointError(
            f"prior_model.name {name!r} is unknown; known: {', '.join('gptc-' + size for size in PRIOR_SIZES)}"
        )
    arguments = read_group(prior, "args", "prior_model.") if prior.get("args") else {}
    check_fixed(arguments, FIXED_IN_PRIOR, "prior_model.args.")
    depth, heads, width = PRIOR_SIZES[name.removeprefix("gptc-")]
    prior = {"no_dropout": False, "n_rounds": 2, "latent_ce_temperature": 1.0} | prior
    arguments = {"resid_pdrop": 0.1, "max_seq_len": 1024} | arguments
    dropout = read_float(arguments, "resid_pdrop", "prior_model.args.")
    return PriorConfig(
        depth=depth,
        heads=heads,
        width=width,
        dropout=0.0 if read_bool(prior, "no_dropout", "prior_model.") else dropout,
        positions=read_int(arguments, "max_seq_len", "prior_model.args."),
        rounds=read_int(prior, "n_rounds", "prior_model."),
        temperature=read_float(prior, "latent_ce_temperature", "prior_model."),
    )


def tokenizer_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the published tensors and fuse the prior's query, key and value."""
    renamed = {}
    for name, tensor in tensors.items():
        name = rename_prefix(name, RENAMED)
        if name.startswith("prior."):
            for old, new in RENAMED_IN_PRIOR.items():
                name = name.replace(old, new)
        renamed[name] = tensor
    for name in [n for n in renamed if ".attn.query." in n]:
        parts = [renamed.pop(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        # torch.cat would cast tensors of different dtypes silently.
        if len({(part.shape, part.dtype) for part in parts}) > 1:
            found = ", ".join(f"{tuple(part.shape)} {part.dtype}" for part in parts)
            raise CheckpointError(f"{name} and its key and value differ: {found}")
        renamed[name.replace(".query.", ".qkv.")] = torch.cat(parts)
    return add_temporal_axis(renamed)


def tokenizer_to_published(config: TokenizerConfig, tensors: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Convert a tokenizer to the published layout, the inverse of `tokenizer_from_published`.

    Raises CheckpointError, naming the field, for a config that the published layout cannot represent.
    """
    return published_config(config), published_tensors(tensors)


def published_config(config: TokenizerConfig) -> dict:
    """Return the nested published config; CheckpointError as in `tokenizer_to_published`.

    `init` is left out, because it affects the initial weights only.
    """
    c = config
    square = {"height": (c.height, c.width), "patch_size": c.patch_size[1:]}
    for name, (rows, columns) in square.items():
        if rows != columns:
            raise not_representable(name, f"{rows} rows and {columns} columns", "only squares")
    if c.decoder_patch_size not in (None, c.patch_size):
        raise not_representable("decoder_patch_size", c.decoder_patch_size, "the published decoder needs the encoder's")
    if c.nested:
        raise not_representable("nested", True, "it has no mask latent")
    published = FIXED | TRAINING
    published |= {"encoder_name": None, "decoder_name": None, "prior_model": published_prior(c.prior)}
    quantizer = {"codebook_size": c.codebook_size, "stochastic": c.stochastic, "stochastic_temperature": c.temperature}
    quantizer |= FIXED_IN_QUANTIZER | TRAINING_OF_QUANTIZER
    bottleneck = {"bottleneck_dim": c.code_dim, "regularizer": {"name": "vq", "args": quantizer}, **FIXED_IN_BOTTLENECK}
    published |= {"bottleneck": {"name": "bottleneck", "args": bottleneck}, "bottleneck_token_num": c.num_tokens}
    published |= {"input_size": c.height, "frame_num": c.num_frames}
    for side in ("", "decoder_"):
        published |= {f"{side}temporal_patch_size": c.patch_size[0], f"{side}patch_size": c.patch_size[1]}
    for side in ("encoder", "decoder"):
        published[f"{side}_hidden_size"] = getattr(c, f"{side}_width")
        published[f"{side}_depth"] = getattr(c, f"{side}_depth")
        published[f"{side}_num_heads"] = getattr(c, f"{side}_heads")
    return published


def published_prior(prior: PriorConfig) -> dict:
    """Return the published settings of the prior; CheckpointError for a size that has no published name."""
    if not prior.enabled:
        return {"name": "none"}
    names = {size: name for name, size in PRIOR_SIZES.items()}
    size = (prior.depth, prior.heads, prior.width)
    if size not in names:
        known = ", ".join(f"{name} {values}" for name, values in PRIOR_SIZES.items())
        raise not_representable("prior.depth, prior.heads, prior.width", size, f"only the named sizes: {known}")
    arguments = dict(FIXED_IN_PRIOR)
    if prior.positions != 1024:
        arguments["max_seq_len"] = prior.positions
    if prior.dropout not in (0.0, 0.1):
        arguments |= dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), prior.dropout)
    own = {"n_rounds": prior.rounds, "latent_ce_temperature": prior.temperature, "no_dropout": prior.dropout == 0.0}
    return {"name": f"gptc-{names[size]}", "args": arguments, **own, **TRAINING_OF_PRIOR}


def published_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Invert `tokenizer_tensors`."""
    back = {new: old for old, new in RENAMED.items()}
    published = {}
    for name, tensor in tensors.items():
        parts = {name: tensor}
        if name.startswith("prior."):
            if ".attn.qkv." in name:
                chunks = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
                parts = {name.replace(".qkv.", f".{part}."): chunk for part, chunk in chunks}
            for old, new in RENAMED_IN_PRIOR.items():
                parts = {key.replace(new, old): value for key, value in parts.items()}
        published |= {rename_prefix(key, back): value for key, value in parts.items()}
    return remove_temporal_axis(published)
