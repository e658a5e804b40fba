"""save_pretrained / from_pretrained for every model of larp: a readable config.json beside model.safetensors, loaded strictly.

Not huggingface_hub's model mixin: it drops unknown configuration keys in silence and cannot read the published layout.
"""

import hashlib
import json
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path

from larp.config import from_dict

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
RUN_MODEL = "model"
"""Where the folder of a training run keeps its model."""
EMA = "ema"
"""The variant of a checkpoint that holds the averaged weights of its training."""
_STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def weights_file(variant: str | None = None) -> str:
    """Return the name of a variant's file in a model folder, as diffusers names it: model.safetensors, model.ema.safetensors."""
    return WEIGHTS if variant is None else f"model.{variant}.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that is absent, incomplete or of another shape than its config says."""


class LarpModel(nn.Module):
    """Base of the models: subclasses set `model_type` and `config_class`, and take one config in their constructor."""

    model_type: str
    config_class: type
    exact: tuple[str, ...] = ()
    """Parameters that are never stored in 16 bits."""

    @classmethod
    def from_published(cls, config: dict, tensors: dict[str, Tensor]) -> tuple[object, dict[str, Tensor]]:
        """Translate a config and tensors of the published layout into ours; models with such a layout override this."""
        raise CheckpointError(f"no published layout of {cls.model_type} is known")

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, revision: str | None = None, device="cpu", variant: str | None = None
    ):
        """Load a model in evaluation mode from a local folder or a hub repository, in our layout or the published one.

        `variant="ema"` takes the averaged weights. Raises CheckpointError that names the files, keys or tensors at fault, those
        of another dtype and those with NaN or infinity among them, and ValueError for a device that is not there. No pickle is ever
        read.
        """
        check_device(device)
        folder = resolve(path, revision, variant)
        config, tensors = read(folder, variant)
        stored = None
        if "model_type" in config and config.get("larp_format") is not None:
            if config["model_type"] != cls.model_type:
                raise CheckpointError(f"{folder} holds a {config['model_type']}, not a {cls.model_type}")
            if type(config["larp_format"]) is not int or config["larp_format"] < 1:
                raise CheckpointError(
                    f"{folder / CONFIG}: larp_format is {config['larp_format']!r}, expected a whole number from 1 to {FORMAT}"
                )
            if config["larp_format"] > FORMAT:
                raise CheckpointError(
                    f"{folder} has format {config['larp_format']}; this version reads up to {FORMAT}: update larp"
                )
            stored = config.get("dtype", "float32")
            tensors = widened(tensors, stored, folder / CONFIG)
            values = {k: v for k, v in config.items() if k not in ("model_type", "larp_format", "dtype")}
            settings = from_dict(cls.config_class, values, where=str(folder / CONFIG))
        else:
            try:
                settings, tensors = cls.from_published(config, tensors)
            except ValueError as error:
                raise CheckpointError(f"{folder / CONFIG}: {error}") from error
        try:
            # Without memory at first: a damaged config may ask for more than there is.
            with torch.device("meta"):
                expected = cls(settings).state_dict()
        except RuntimeError as error:
            raise CheckpointError(f"{folder / CONFIG} describes a model that cannot be built: {error}") from error
        check_fits(expected, tensors, str(folder), stored)
        model = cls(settings)
        model.load_state_dict(tensors)
        return model.eval().to(device)

    def save_pretrained(
        self, folder: str | Path, *, ema: "LarpModel | None" = None, dtype: torch.dtype = torch.float32
    ) -> Path:
        """Write config.json and model.safetensors into `folder`, each whole or not at all, and return the folder.

        `dtype` bfloat16 or float16 stores the weights in half the space, as config.json says, and they are float32 again when they
        are loaded; codebooks and positions stay float32.

        `ema`, the same model with averaged weights, goes beside it as model.ema.safetensors; without it the folder holds none,
        since an older one would belong to other weights. Raises ValueError if the two differ in their config, and if `folder` is a
        file.
        """
        if ema is not None and ema.config != self.config:
            raise ValueError("the averaged model has another config than the model: save it into a folder of its own")
        folder = make_folder(folder)
        (folder / weights_file(EMA)).unlink(missing_ok=True)
        self._write_weights(folder / WEIGHTS, dtype)
        if ema is not None:
            ema._write_weights(folder / weights_file(EMA), dtype)
        stored = {} if dtype == torch.float32 else {"dtype": str(dtype).removeprefix("torch.")}
        config = {"model_type": self.model_type, "larp_format": FORMAT, **stored, **asdict(self.config)}
        part = folder / (CONFIG + ".part")
        part.write_text(json.dumps(config, indent=2) + "\n")
        part.replace(folder / CONFIG)
        return folder

    def _write_weights(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        # Positions are functions of the config, but stored: a checkpoint then explains itself.
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in self.state_dict().items()}
        if dtype != torch.float32:
            tensors |= {k: tensors[k].to(dtype) for k, _ in self.named_parameters() if k not in self.exact}
        part = path.with_name(path.name + ".part")
        # safetensors gives its files to the owner alone; others may read a model as they may read its config.json.
        part.unlink(missing_ok=True)
        part.touch()
        mode = part.stat().st_mode & 0o777
        save_file(tensors, part, metadata={"format": "pt"})
        part.chmod(mode)
        part.replace(path)

    def push_to_hub(
        self, repo_id: str, *, ema: "LarpModel | None" = None, private: bool = False, token: str | None = None
    ) -> str:
        """Upload what `save_pretrained` writes to a hub repository, made if it does not exist, and return its address.

        Raises ValueError as `save_pretrained` does, and CheckpointError if the hub cannot be reached or refuses.
        """
        import tempfile

        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, ema=ema)
            try:
                api = HfApi(token=token)
                url = api.create_repo(repo_id, private=private, exist_ok=True)
                # What is uploaded is kept all the same: this takes away the averaged weights of an earlier upload only.
                api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns=[weights_file(EMA)])
            except Exception as error:  # the hub raises a family of its own, httpx another
                raise CheckpointError(
                    f"{repo_id} could not be uploaded to the hub ({described(error)}); see to the network and the token (hf auth "
                    "login), or keep the model in a folder with save_pretrained"
                ) from error
        return str(url)

    def weight_hash(self) -> str:
        """Return the SHA-256 (hex) of the config and all tensors: the name under which codes of this model are cached.

        Of the config what differs from the defaults counts: a field that a later version adds, with a default that changes nothing,
        leaves the names of older models as they are.
        """
        digest = hashlib.sha256(json.dumps(changed(self.config), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def num_parameters(self) -> int:
        """Count the learned numbers."""
        return sum(p.numel() for p in self.parameters())


def make_folder(folder: str | Path) -> Path:
    """Return `folder`, made with its parents where it was missing; ValueError if it or a parent is a file."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{folder} cannot be a folder, it or a part of its path is a file: give another") from error
    return folder


def described(error: Exception) -> str:
    """Return the kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def changed(config) -> dict:
    """Return what of a config dataclass differs from its defaults, groups as dicts of the same kind."""
    values = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            if inside := changed(value):
                values[field.name] = inside
        elif field.default is MISSING or value != field.default:
            values[field.name] = value
    return values


def resolve(path: str | Path, revision: str | None = None, variant: str | None = None) -> Path:
    """Return the local folder of `path`: itself, or the model in it if it is that of a run, else a snapshot of the hub repository of
    that name.

    Of a repository only the config and the weights of `variant` are fetched.
    """
    if (folder := Path(path)).is_dir():
        inside = folder / RUN_MODEL
        # config.json alone does not tell: the folder of a run has one, too.
        is_run = not (folder / weights_file(variant)).is_file() and (inside / CONFIG).is_file()
        return inside if is_run else folder
    name = str(path)
    looks_like_a_repository = name.count("/") == 1 and not name.startswith((".", "/", "~")) and "\\" not in name
    if not looks_like_a_repository:
        raise CheckpointError(f"{name}: no such folder (and not a hub name of the form owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG, weights_file(variant)]))
    except Exception as error:  # the hub raises a family of its own, httpx another
        raise CheckpointError(
            f"{name} is no local folder and could not be fetched from the hub ({described(error)}); give the path of a local "
            "checkpoint"
        ) from error


def read(folder: Path, variant: str | None = None) -> tuple[dict, dict[str, Tensor]]:
    """Read config.json and the weights of a folder."""
    weights = weights_file(variant)
    if variant is not None and (folder / CONFIG).is_file() and not (folder / weights).is_file():
        raise CheckpointError(
            f"{folder} holds no variant '{variant}': {weights} is missing; load it without a variant, or train the model "
            "with its average (--ema 0.999 in training)"
        )
    for name in (CONFIG, weights):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is no checkpoint: {name} is missing")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG} holds {str(config)[:40]}, expected an object of named fields")
    try:
        tensors = load_file(folder / weights)
    except Exception as error:  # safetensors raises SafetensorError, which is no ValueError
        raise CheckpointError(
            f"{folder / weights} cannot be read ({error}); it may be truncated: copy it again"
        ) from error
    return config, tensors


def widened(tensors: dict[str, Tensor], dtype: str, where: Path) -> dict[str, Tensor]:
    """Return weights that config.json declares to be stored in 16 bits as float32, and others as they are; CheckpointError for
    another dtype there."""
    if dtype not in _STORED:
        raise CheckpointError(f"{where}: dtype is {dtype!r}, expected one of {', '.join(_STORED)}")
    return {k: v.float() if v.dtype == _STORED[dtype] else v for k, v in tensors.items()}


def check_fits(expected: dict[str, Tensor], tensors: dict[str, Tensor], where: str, stored: str | None = None) -> None:
    """Raise CheckpointError that lists what of `expected` is missing, of another shape or dtype, or not finite, and what is too much.

    `expected` may lie on the meta device. stored: the `dtype` of config.json, in a layout that has one.
    """
    problems = [f"missing {k} {tuple(v.shape)}" for k, v in expected.items() if k not in tensors]
    problems += [f"unexpected {k} {tuple(v.shape)}" for k, v in tensors.items() if k not in expected]
    both = [(k, v, tensors[k]) for k, v in expected.items() if k in tensors]
    problems += [
        f"{k} is {tuple(found.shape)}, the config says {tuple(want.shape)}"
        for k, want, found in both
        if found.shape != want.shape
    ]
    complain(problems, f"{where} does not fit its config")
    problems = [f"{k} is {found.dtype}, not {want.dtype}" for k, want, found in both if found.dtype != want.dtype]
    remedy = "cast them with .float() and save again"
    odd = {found.dtype for _, want, found in both if found.dtype != want.dtype}
    if stored is not None and odd in ({torch.bfloat16}, {torch.float16}):
        name = str(odd.pop()).removeprefix("torch.")
        remedy = f'if the file is stored so, {CONFIG} says {stored} where it must say "dtype": "{name}"; else {remedy}'
    complain(problems, f"{where} holds tensors of another dtype, and none is cast in silence ({remedy})")
    problems = [f"{k} has NaN or infinity" for k, _, found in both if not bool(torch.isfinite(found).all())]
    complain(problems, f"{where} is damaged (copy it again, or take an earlier checkpoint)")


def complain(problems: list[str], about: str) -> None:
    """Raise CheckpointError with the first of the problems, if there are any."""
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{about}: {'; '.join(problems[:8])}{more}")


def choose_device(device: str | None = None) -> str:
    """Return `device`, or by default the GPU if there is one. ValueError as `check_device`."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    return device


def check_device(device: str | torch.device) -> None:
    """Raise ValueError, with the devices of this machine, unless torch can put a tensor on `device` and read it back."""
    try:
        torch.zeros(1, device=torch.device(device)).tolist()
    except Exception as error:  # a family of its own for each way in which a device can be absent
        found = ["cpu"]
        if torch.cuda.is_available():
            found += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            found += ["mps"]
        raise ValueError(f"device {str(device)!r} is not there; this machine has {', '.join(found)}") from error
