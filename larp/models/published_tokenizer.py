"""A tokenizer in the published LARP layout (hub repositories hywang66/LARP-L-long-*), read and written.

The published file holds the same tensors as ours, the three fixed position tables included, under other names and with the prior's
query, key and value apart.
"""

from larp.hub import CheckpointError
from larp.models.prior import PRIOR_SIZES, PriorConfig
from larp.models.published_fields import (
    check_fixed,
    flag,
    group,
    inexpressible,
    number,
    warn_of_unknown,
    whole,
    with_prefix,
    with_temporal_kernel,
    without_temporal_kernel,
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
    "transformer_name": STACK,
    "latent_pe_scale_factor": 10000,
}


FIXED_IN_BOTTLENECK = {"norm": "none"}


FIXED_IN_QUANTIZER = {"l2_normalized": True}


FIXED_IN_PRIOR = {"l2_normalized": True}


# Settings of training and initialisation that the published code asks for; a finished model does not depend on them.
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


# A config that sets every published field: what is not in it is not known.
EVERYTHING = TokenizerConfig(num_tokens=16, prior=PriorConfig(positions=16, dropout=0.2))


def tokenizer_from_published(config: dict, tensors: dict[str, Tensor]) -> tuple[TokenizerConfig, dict[str, Tensor]]:
    """Translate a published tokenizer; raises CheckpointError that names the field which is absent or not supported."""
    try:
        return tokenizer_config(config), tokenizer_tensors(tensors)
    except KeyError as error:
        raise CheckpointError(f"this is no LARP tokenizer checkpoint: {error.args[0]!r} is missing") from error


def tokenizer_config(config: dict) -> TokenizerConfig:
    """Read the nested published config; numbers written as strings are cast."""
    inner, outer = "bottleneck.args.regularizer.", "bottleneck.args."
    bottleneck = group(group(config, "bottleneck"), "args", "bottleneck.")
    regularizer = group(bottleneck, "regularizer", outer)
    quantizer = group(regularizer, "args", inner)
    warn_of_unknown(config, published_config(EVERYTHING))
    check_fixed(config, FIXED)
    check_fixed(config["bottleneck"], {"name": "bottleneck"}, "bottleneck.")
    check_fixed(bottleneck, FIXED_IN_BOTTLENECK, outer)
    check_fixed(regularizer, {"name": "vq"}, inner)
    check_fixed(quantizer, FIXED_IN_QUANTIZER, inner + "args.")
    for side in ("encoder_name", "decoder_name"):
        if config.get(side) is not None and str(config[side]).lower() not in (*ABSENT, STACK):
            raise CheckpointError(f"published config field {side} = {config[side]!r} is not supported (only {STACK!r})")
    patch, frames = whole(config, "patch_size"), whole(config, "temporal_patch_size")
    out_patch = whole(config, "decoder_patch_size") if config.get("decoder_patch_size") else patch
    out_frames = whole(config, "decoder_temporal_patch_size") if config.get("decoder_temporal_patch_size") else frames
    return TokenizerConfig(
        num_frames=whole(config, "frame_num"),
        height=whole(config, "input_size"),
        width=whole(config, "input_size"),
        patch_size=(frames, patch, patch),
        decoder_patch_size=None if (out_frames, out_patch) == (frames, patch) else (out_frames, out_patch, out_patch),
        num_tokens=whole(config, "bottleneck_token_num"),
        codebook_size=whole(quantizer, "codebook_size", inner + "args."),
        code_dim=whole(bottleneck, "bottleneck_dim", outer),
        encoder_width=whole(config, "encoder_hidden_size"),
        encoder_depth=whole(config, "encoder_depth"),
        encoder_heads=whole(config, "encoder_num_heads"),
        decoder_width=whole(config, "decoder_hidden_size"),
        decoder_depth=whole(config, "decoder_depth"),
        decoder_heads=whole(config, "decoder_num_heads"),
        stochastic=flag(quantizer, "stochastic", inner + "args."),
        temperature=number(quantizer, "stochastic_temperature", inner + "args."),
        prior=prior_config(group(config, "prior_model") if config.get("prior_model") else {}),
    )


def prior_config(prior: dict) -> PriorConfig:
    """Read the published settings of the prior; no name, or "none", is a tokenizer without it."""
    name = str(prior.get("name", ""))
    if name.lower() in ABSENT:
        return PriorConfig(enabled=False)
    if name.removeprefix("gptc-") not in PRIOR_SIZES:
        raise CheckpointError(
            f"prior_model.name {name!r} is unknown; known: {', '.join('gptc-' + size for size in PRIOR_SIZES)}"
        )
    arguments = group(prior, "args", "prior_model.") if prior.get("args") else {}
    check_fixed(arguments, FIXED_IN_PRIOR, "prior_model.args.")
    depth, heads, width = PRIOR_SIZES[name.removeprefix("gptc-")]
    prior = {"no_dropout": False, "n_rounds": 2, "latent_ce_temperature": 1.0} | prior
    arguments = {"resid_pdrop": 0.1, "max_seq_len": 1024} | arguments
    dropout = number(arguments, "resid_pdrop", "prior_model.args.")
    return PriorConfig(
        depth=depth,
        heads=heads,
        width=width,
        dropout=0.0 if flag(prior, "no_dropout", "prior_model.") else dropout,
        positions=whole(arguments, "max_seq_len", "prior_model.args."),
        rounds=whole(prior, "n_rounds", "prior_model."),
        temperature=number(prior, "latent_ce_temperature", "prior_model."),
    )


def tokenizer_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the published tensors and fuse the prior's query, key and value."""
    renamed = {}
    for name, tensor in tensors.items():
        name = with_prefix(name, RENAMED)
        if name.startswith("prior."):
            for old, new in RENAMED_IN_PRIOR.items():
                name = name.replace(old, new)
        renamed[name] = tensor
    for name in [n for n in renamed if ".attn.query." in n]:
        parts = [renamed.pop(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        # What is joined takes the widest dtype: a cast in silence.
        if len({(part.shape, part.dtype) for part in parts}) > 1:
            found = ", ".join(f"{tuple(part.shape)} {part.dtype}" for part in parts)
            raise CheckpointError(f"{name} and its key and value differ: {found}")
        renamed[name.replace(".query.", ".qkv.")] = torch.cat(parts)
    return with_temporal_kernel(renamed)


def tokenizer_to_published(config: TokenizerConfig, tensors: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Translate a tokenizer of ours, tensors as they are: what `tokenizer_from_published` turns back into it.

    Raises CheckpointError that names a field which the published layout cannot express.
    """
    return published_config(config), published_tensors(tensors)


def published_config(config: TokenizerConfig) -> dict:
    """Write the nested published config; CheckpointError as in `tokenizer_to_published`.

    `init` is left out: it says how the weights began, not what they compute.
    """
    c = config
    square = {"height": (c.height, c.width), "patch_size": c.patch_size[1:]}
    for name, (rows, columns) in square.items():
        if rows != columns:
            raise inexpressible(name, f"{rows} rows and {columns} columns", "only squares")
    if c.decoder_patch_size not in (None, c.patch_size):
        raise inexpressible(
            "decoder_patch_size", c.decoder_patch_size, "the published decoder fails with a patch of its own"
        )
    if c.nested:
        raise inexpressible("nested", True, "there is no mask latent")
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
    """Write the settings of the prior; CheckpointError for a size that has no published name."""
    if not prior.enabled:
        return {"name": "none"}
    names = {size: name for name, size in PRIOR_SIZES.items()}
    size = (prior.depth, prior.heads, prior.width)
    if size not in names:
        known = ", ".join(f"{name} {values}" for name, values in PRIOR_SIZES.items())
        raise inexpressible("prior.depth, prior.heads, prior.width", size, f"only the named sizes: {known}")
    arguments = dict(FIXED_IN_PRIOR)
    if prior.positions != 1024:
        arguments["max_seq_len"] = prior.positions
    if prior.dropout not in (0.0, 0.1):
        arguments |= dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), prior.dropout)
    own = {"n_rounds": prior.rounds, "latent_ce_temperature": prior.temperature, "no_dropout": prior.dropout == 0.0}
    return {"name": f"gptc-{names[size]}", "args": arguments, **own, **TRAINING_OF_PRIOR}


def published_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `tokenizer_tensors`."""
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
        published |= {with_prefix(key, back): value for key, value in parts.items()}
    return without_temporal_kernel(published)
