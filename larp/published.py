"""The published LARP checkpoint layout (hub repositories hywang66/LARP-L-long-*), translated to ours and back.

    python -m larp.published runs/mine/model published/     # a tokenizer that the published code loads as it is
    python -m larp.published runs/mine/model published/ --variant ema       # its averaged weights

The published file holds the same tensors as ours, the three fixed position tables included, under other names and with the
prior's query, key and value apart.
"""

import argparse
import json
from pathlib import Path
from typing import NoReturn

from larp.config import run_script
from larp.discriminator import Discriminator, DiscriminatorConfig
from larp.hub import CONFIG, WEIGHTS, CheckpointError, make_folder
from larp.prior import PRIOR_SIZES, PriorConfig
from larp.published_fields import check_fixed, flag, group, number, warn_of_unknown, whole
from larp.tokenizer import LarpTokenizer, TokenizerConfig

import torch
from safetensors.torch import save_file
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
RENAMED_IN_DISCRIMINATOR = {
    "transformer_encoder": "encoder",
    "x_embedder.proj": "x_embedder",
    "encoder_pos_embed": "positions",
}
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


def with_prefix(name: str, renamed: dict[str, str]) -> str:
    """Replace the beginning of a tensor name, up to a dot or its end, as the table says."""
    for old, new in renamed.items():
        if name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    return name


def with_temporal_kernel(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the patch embedding its temporal axis: for patches of one frame the published one is a Conv2d."""
    weight = tensors.get("x_embedder.weight")
    return tensors | {"x_embedder.weight": weight.unsqueeze(2)} if weight is not None and weight.ndim == 4 else tensors


def without_temporal_kernel(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `with_temporal_kernel`."""
    weight = tensors["x_embedder.proj.weight"]
    return tensors | {"x_embedder.proj.weight": weight.squeeze(2)} if weight.shape[2] == 1 else tensors


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


def inexpressible(name: str, value: object, why: str) -> CheckpointError:
    """The error for a field of ours that the published layout has no place for."""
    return CheckpointError(f"{name} = {value} cannot be written in the published layout: {why}")


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


def discriminator_from_published(
    config: dict, tensors: dict[str, Tensor]
) -> tuple[DiscriminatorConfig, dict[str, Tensor]]:
    """Translate a discriminator of the reference; raises CheckpointError that names the field which is absent or wrong."""
    warn_of_unknown(config, discriminator_settings(DiscriminatorConfig()))
    check_fixed(config, {"in_channels": 3})
    renamed = {with_prefix(name, RENAMED_IN_DISCRIMINATOR): tensor for name, tensor in tensors.items()}
    try:
        patch, size = whole(config, "patch_size"), whole(config, "input_size")
        settings = DiscriminatorConfig(
            num_frames=whole(config, "frame_num"),
            height=size,
            width=size,
            patch_size=(whole(config, "temporal_patch_size"), patch, patch),
            hidden=whole(config, "hidden_size"),
            depth=whole(config, "n_layers"),
            heads=whole(config, "n_heads"),
        )
    except KeyError as error:
        raise CheckpointError(f"this is no LARP discriminator checkpoint: {error.args[0]!r} is missing") from error
    return settings, with_temporal_kernel(renamed)


def discriminator_to_published(
    config: DiscriminatorConfig, tensors: dict[str, Tensor]
) -> tuple[dict, dict[str, Tensor]]:
    """Translate a discriminator of ours; CheckpointError names a field which the published layout cannot express."""
    back = {new: old for old, new in RENAMED_IN_DISCRIMINATOR.items()}
    renamed = {with_prefix(name, back): tensor for name, tensor in tensors.items()}
    return discriminator_settings(config), without_temporal_kernel(renamed)


def discriminator_settings(config: DiscriminatorConfig) -> dict:
    """Write the published config of a discriminator; CheckpointError as in `discriminator_to_published`."""
    c = config
    for name, (rows, columns) in {"height": (c.height, c.width), "patch_size": c.patch_size[1:]}.items():
        if rows != columns:
            raise inexpressible(name, f"{rows} rows and {columns} columns", "only squares")
    published = {"hidden_size": c.hidden, "n_heads": c.heads, "n_layers": c.depth, "input_size": c.height}
    published |= {"temporal_patch_size": c.patch_size[0], "patch_size": c.patch_size[1], "in_channels": 3}
    return published | {"frame_num": c.num_frames}


def save_published(model: LarpTokenizer | Discriminator, folder: str | Path) -> Path:
    """Write a model in the published layout, config.json beside model.safetensors, and return the folder.

    Raises CheckpointError, before anything is written, that names a field which that layout cannot express, and ValueError if
    `folder` is a file.
    """
    to_published = discriminator_to_published if isinstance(model, Discriminator) else tokenizer_to_published
    config, tensors = to_published(model.config, model.state_dict())
    folder = make_folder(folder)
    # Copies, because safetensors refuses tensors that share memory, as the parts of a fused weight do.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / (WEIGHTS + ".part"), metadata={"format": "pt"})
    (folder / (WEIGHTS + ".part")).replace(folder / WEIGHTS)
    (folder / (CONFIG + ".part")).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / (CONFIG + ".part")).replace(folder / CONFIG)
    return folder


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}\n{self.format_usage().strip()}")


def main(argv: list[str] | None = None) -> dict:
    """Write the tokenizer of a folder or hub repository in the published layout: `python -m larp.published FROM TO`."""
    parser = _Parser(prog="python -m larp.published", description="Write a tokenizer in the published LARP layout.")
    parser.add_argument("source", metavar="FROM", help="folder or hub name of a tokenizer")
    parser.add_argument("target", metavar="TO", help="folder to write to")
    parser.add_argument("--variant", help="weights to take: 'ema' for the averaged ones; by default the last ones")
    arguments = parser.parse_args(argv)
    source, target = arguments.source, arguments.target
    if Path(target).exists() and Path(source).exists() and Path(target).samefile(source):
        raise ValueError(f"{target} is the folder that is read: give another one to write to")
    print(f"wrote {save_published(LarpTokenizer.from_pretrained(source, variant=arguments.variant), target)}")
    return {}


if __name__ == "__main__":
    run_script("larp.published", main)
