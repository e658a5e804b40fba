"""Saving, strict loading and uploading of larp's models (config.json beside model.safetensors), weight hashes, and devices.

huggingface_hub's model mixin is not used: it ignores unknown config keys and cannot read the published layout.
"""

import hashlib
import json
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path, PurePosixPath

from larp.config import from_dict, is_whole
from larp.files import read_json, replacing, user_path
from larp.hub_files import ANSWER, snapshot, within
from larp.kernels.threads import limit_threads

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
RUN_MODEL = "model"
"""Subfolder of a training run that holds its model."""
EMA = "ema"
"""The variant of a checkpoint with the exponential moving average of the weights."""
_STORED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

loading = threading.RLock()
"""Held while a model is built or loaded, by larp_mllm as well: transformers patches torch's initialisation meanwhile, and sets
its default dtype, for all threads of the process."""


def weights_file(variant: str | None = None) -> str:
    """Return the file name of a variant as in diffusers: model.safetensors, model.ema.safetensors."""
    return WEIGHTS if variant is None else f"model.{variant}.safetensors"


def averaged(folder: Path) -> str | None:
    """Return the variant of the averaged weights if a model folder has them, else None, its weights."""
    return EMA if (folder / weights_file(EMA)).exists() else None


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete, damaged, or does not match its config."""


class LarpModel(nn.Module):
    """Base class of the models. Subclasses set `model_type` and `config_class`; their constructor takes one config."""

    model_type: str
    config_class: type
    keep_in_fp32: tuple[str, ...] = ()
    """Parameters that are never stored in 16 bits."""

    @classmethod
    def from_published(cls, config: dict, tensors: dict[str, Tensor]) -> tuple[object, dict[str, Tensor]]:
        """Convert a config and tensors from the published layout to ours. Models with such a layout override this."""
        raise CheckpointError(f"there is no published layout of {cls.model_type}: give a checkpoint that larp wrote")

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, except those of `keep_in_fp32`."""
        return next(p.dtype for name, p in self.named_parameters() if name not in self.keep_in_fp32)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None = None,
        *,
        revision: str | None = None,
        subfolder: str = "",
        device: str | torch.device = "cpu",
        device_map: str | torch.device | dict | None = None,
        dtype: str | torch.dtype | None = None,
        variant: str | None = None,
        **older,
    ):
        """Load a model in evaluation mode from a local folder or a hub repository, in our layout or the published one.

        Pickled weights are never read.

        Args:
            pretrained_model_name_or_path: a model folder, the folder of a training run, or a repository name OWNER/NAME.
            revision: branch, tag or commit of the repository.
            subfolder: of the folder or the repository, where the model is in one.
            device: of the model.
            device_map: the same in the words of transformers and diffusers: a device, {"": device}, or "auto", a GPU if there is
                one. The model is never split.
            dtype: of the weights, "auto" for the stored one; by default float32. Codebooks stay float32.
            variant: "ema" loads the averaged weights.
            **older: older names: `path`, and `torch_dtype` for `dtype`.

        Raises CheckpointError, naming the file, key or tensor, for anything missing, unknown, of another shape or dtype, or
        not finite; ValueError for a device that this machine lacks, and for a dtype that is no floating-point one;
        TypeError for an unknown keyword.
        """
        path, dtype = _newer_names(cls.__name__, older, path=pretrained_model_name_or_path, torch_dtype=dtype)
        device = _one_device(device, device_map)
        dtype = _float_dtype(dtype)
        limit_threads()
        folder = resolve(path, revision, variant, subfolder)
        config, tensors = _read_checkpoint(folder, variant)
        stored = None
        if "model_type" in config and config.get("larp_format") is not None:
            if config["model_type"] != cls.model_type:
                raise CheckpointError(f"{folder} holds a {config['model_type']}, not a {cls.model_type}")
            if not is_whole(config["larp_format"]) or config["larp_format"] < 1:
                raise CheckpointError(
                    f"{folder / CONFIG}: larp_format is {config['larp_format']!r}, expected a whole number from 1 to {FORMAT}"
                )
            if config["larp_format"] > FORMAT:
                raise CheckpointError(
                    f"{folder} has format {config['larp_format']}; this version reads up to {FORMAT}: update larp"
                )
            stored = config.get("dtype", "float32")
            tensors = _upcast(tensors, stored, folder / CONFIG)
            values = {k: v for k, v in config.items() if k not in ("model_type", "larp_format", "dtype")}
            settings = from_dict(cls.config_class, values, where=str(folder / CONFIG))
        else:
            try:
                settings, tensors = cls.from_published(config, tensors)
            except ValueError as error:
                raise CheckpointError(f"{folder / CONFIG}: {error}") from error
        try:
            # On the meta device first: a damaged config may ask for more memory than there is.
            with loading, torch.device("meta"):
                expected = cls(settings).state_dict()
        except RuntimeError as error:
            raise CheckpointError(f"{folder / CONFIG} describes a model that cannot be built: {error}") from error
        _check_tensors(expected, tensors, str(folder), stored)
        with loading:
            model = cls(settings)
        model.load_state_dict(tensors)
        if dtype == "auto":
            dtype = _STORED_DTYPES[stored or "float32"]
        model = model.eval().to(device, dtype)
        for name in model.keep_in_fp32:
            model.get_parameter(name).data = tensors[name].to(device)
        return model

    def save_pretrained(
        self, folder: str | Path, *, ema: "LarpModel | None" = None, dtype: torch.dtype = torch.float32
    ) -> Path:
        """Write config.json and model.safetensors into `folder`, each atomically, and return the folder.

        Args:
            ema: the same model with averaged weights, written to model.ema.safetensors. Without it an existing
                model.ema.safetensors is deleted, since it belongs to other weights.
            dtype: of the stored weights, recorded in config.json; loading casts them to float32. Codebooks and positions
                are always stored in float32.

        Raises ValueError if `ema` has another config, or `folder` is a file.
        """
        if ema is not None and ema.config != self.config:
            raise ValueError("the averaged model has another config than the model: save it into a folder of its own")
        folder = make_folder(folder)
        stored = {} if dtype == torch.float32 else {"dtype": str(dtype).removeprefix("torch.")}
        config = {"model_type": self.model_type, "larp_format": FORMAT, **stored, **asdict(self.config)}
        # All are written before the first of them is replaced, so that a full disk leaves an earlier model as it is.
        with ExitStack() as files:
            written = files.enter_context(replacing(folder / CONFIG))
            written.write_text(json.dumps(config, indent=2) + "\n")
            if ema is not None:
                ema._write_weights(files.enter_context(replacing(folder / weights_file(EMA), sync=True)), dtype)
            self._write_weights(files.enter_context(replacing(folder / WEIGHTS, sync=True)), dtype)
            if ema is None:
                (folder / weights_file(EMA)).unlink(missing_ok=True)
        return folder

    def _write_weights(self, path: Path, dtype: torch.dtype) -> None:
        # Position tables follow from the config; they are stored so that the file is complete by itself.
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in self.state_dict().items()}
        if dtype != torch.float32:
            tensors |= {k: tensors[k].to(dtype) for k, _ in self.named_parameters() if k not in self.keep_in_fp32}
        save_file(tensors, path, metadata={"format": "pt"})

    def push_to_hub(
        self, repo_id: str, *, ema: "LarpModel | None" = None, private: bool = False, token: str | None = None
    ) -> str:
        """Upload what `save_pretrained` writes to a hub repository, created if needed, and return its URL.

        Raises ValueError as `save_pretrained` does, and CheckpointError if the upload fails.
        """
        import tempfile

        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, ema=ema)
            try:
                api = HfApi(token=token)
                url = within(lambda: api.create_repo(repo_id, private=private, exist_ok=True), ANSWER)
                # Deletes the averaged weights of an earlier upload, not those of this one.
                api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns=[weights_file(EMA)])
            except Exception as error:  # huggingface_hub and httpx have no common base class
                raise CheckpointError(
                    f"{repo_id} could not be uploaded to the hub ({_describe(error)}): check the network and the token (hf auth "
                    "login), or save the model to a folder with save_pretrained"
                ) from error
        return str(url)

    def weight_hash(self) -> str:
        """Return the SHA-256 (hex) of the config and all tensors. Token caches are keyed by it.

        Only config fields that differ from their defaults count, so that a new field with a neutral default does not change
        the hashes of older models.
        """
        digest = hashlib.sha256(json.dumps(non_default_fields(self.config), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def num_parameters(self) -> int:
        """Return the number of trainable values."""
        return sum(p.numel() for p in self.parameters())


def _newer_names(cls: str, older: dict, **given) -> list:
    """Return the values of `given`, taken from `older` where they have these names. Raises TypeError for others, for two and for no path."""
    call = f"{cls}.from_pretrained"
    if unknown := sorted(older.keys() - given.keys()):
        raise TypeError(
            f"{call} knows no {', '.join(unknown)}: it takes pretrained_model_name_or_path, revision, subfolder, device, device_map, dtype and "
            "variant"
        )
    for name, value in older.items():
        if given[name] is not None:
            raise TypeError(f"{call} was given {name}= and what it is the older name of: leave out {name}=")
        given[name] = value
    if given["path"] is None:
        raise TypeError(f"{call} was given no model: give a folder or a repository name OWNER/NAME first")
    return list(given.values())


def _one_device(device: str | torch.device, device_map: str | torch.device | dict | None) -> str | torch.device:
    """Return the device that `from_pretrained` is asked for. Raises ValueError for more than one, and as `check_device`."""
    if device_map is not None and str(device) != "cpu":
        raise ValueError(f"device is {str(device)!r} and device_map {device_map!r}: give one of the two")
    if device_map == "auto":
        return choose_device()
    if isinstance(device_map, dict):
        if set(device_map) != {""}:
            raise ValueError(
                f'device_map is {device_map!r}, but the model is never split: give a device, or {{"": device}}'
            )
        device_map = device_map[""]
    device = device if device_map is None else device_map
    check_device(device)
    return device


def _float_dtype(dtype: str | torch.dtype | None) -> str | torch.dtype | None:
    """Return a dtype of `from_pretrained`: None, "auto", or a floating-point one, which may be given by name."""
    if dtype is None or dtype == "auto":
        return dtype
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}: give a floating-point one such as torch.bfloat16, or 'auto'")
    return found


def make_folder(folder: str | Path) -> Path:
    """Create `folder` and its parents where missing and return it; ValueError if one of them is a file."""
    folder = user_path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{folder} cannot be created, it or a part of its path is a file: give another") from error
    return folder


def non_default_fields(config) -> dict:
    """Return the fields of a config dataclass that differ from their defaults; nested groups as dicts."""
    values = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            if inside := non_default_fields(value):
                values[field.name] = inside
        elif field.default is MISSING or value != field.default:
            values[field.name] = value
    return values


def resolve(path: str | Path, revision: str | None = None, variant: str | None = None, subfolder: str = "") -> Path:
    """Return the local model folder of `path`: the folder itself, the model of a run folder, or a hub snapshot.

    From a repository only the config and the weights of `variant` are downloaded, from `subfolder` if the model is in one, if they are
    not in the local cache. Raises CheckpointError if there is neither a folder nor a repository of that name, or no such subfolder.
    """
    if (folder := user_path(path)).is_dir():
        if not (folder := folder / (subfolder or "")).is_dir():
            raise CheckpointError(
                f"{path} has no subfolder {subfolder!r}: leave it out, or give the folder of the model"
            )
        inside = folder / RUN_MODEL
        # A run folder has a config.json, too, so the weights decide.
        is_run = not (folder / weights_file(variant)).is_file() and (inside / CONFIG).is_file()
        return inside if is_run else folder
    name = str(path)
    looks_like_a_repository = name.count("/") == 1 and not name.startswith((".", "/", "~")) and "\\" not in name
    if not looks_like_a_repository:
        raise CheckpointError(f"{name}: no such folder (and not a hub name of the form owner/name)")
    wanted = [str(PurePosixPath(subfolder or "", file)) for file in (CONFIG, weights_file(variant))]
    try:
        return Path(snapshot(name, wanted, wanted, revision), subfolder or "")
    except Exception as error:  # huggingface_hub and httpx have no common base class
        raise CheckpointError(
            f"{name} is not a local folder and could not be downloaded from the hub ({_describe(error)}): give the path of "
            "a local checkpoint"
        ) from error


def _describe(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _read_checkpoint(folder: Path, variant: str | None = None) -> tuple[dict, dict[str, Tensor]]:
    """Read config.json and the weights of a folder."""
    weights = weights_file(variant)
    if variant is not None and (folder / CONFIG).is_file() and not (folder / weights).is_file():
        raise CheckpointError(
            f"{folder} holds no variant '{variant}': {weights} is missing; load it without a variant, or train the model "
            "with its average (--ema 0.999 in training)"
        )
    for name in (CONFIG, weights):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is not a checkpoint: {name} is missing")
    try:
        config = read_json(folder / CONFIG)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG} holds {str(config)[:40]}, expected an object of named fields")
    try:
        tensors = load_file(folder / weights)
    except Exception as error:  # safetensors raises SafetensorError, which is not a ValueError
        raise CheckpointError(
            f"{folder / weights} cannot be read ({error}); it may be truncated: copy it again"
        ) from error
    return config, tensors


def _upcast(tensors: dict[str, Tensor], dtype: str, where: Path) -> dict[str, Tensor]:
    """Cast tensors of `dtype`, which config.json declares for stored weights, to float32; leave others unchanged."""
    if str(dtype) not in _STORED_DTYPES:
        raise CheckpointError(f"{where}: dtype is {dtype!r}, expected one of {', '.join(_STORED_DTYPES)}")
    return {k: v.float() if v.dtype == _STORED_DTYPES[dtype] else v for k, v in tensors.items()}


def _check_tensors(
    expected: dict[str, Tensor], tensors: dict[str, Tensor], where: str, stored: str | None = None
) -> None:
    """Raise CheckpointError that lists the tensors that are missing, unexpected, of another shape or dtype, or not finite.

    `expected` may be on the meta device. `stored` is the `dtype` of config.json, or None in the published layout.
    """
    problems = [f"missing {k} {tuple(v.shape)}" for k, v in expected.items() if k not in tensors]
    problems += [f"unexpected {k} {tuple(v.shape)}" for k, v in tensors.items() if k not in expected]
    both = [(k, v, tensors[k]) for k, v in expected.items() if k in tensors]
    problems += [
        f"{k} is {tuple(found.shape)}, the config says {tuple(want.shape)}"
        for k, want, found in both
        if found.shape != want.shape
    ]
    check_fit(problems, where)
    problems = [f"{k} is {found.dtype}, not {want.dtype}" for k, want, found in both if found.dtype != want.dtype]
    remedy = "cast them with .float() and save again"
    odd = {found.dtype for _, want, found in both if found.dtype != want.dtype}
    if stored is not None and odd in ({torch.bfloat16}, {torch.float16}):
        name = str(odd.pop()).removeprefix("torch.")
        remedy = f'if the file is stored so, {CONFIG} says {stored} where it must say "dtype": "{name}"; else {remedy}'
    if problems:
        raise CheckpointError(f"{where} has tensors of another dtype: {_first_of(problems)}. None is cast: {remedy}")
    if problems := [f"{k} has NaN or infinity" for k, _, found in both if not is_finite(found)]:
        raise CheckpointError(
            f"{where} is damaged: {_first_of(problems)}. Copy it again, or take an earlier checkpoint"
        )


def check_fit(problems: Sequence[str], where: str) -> None:
    """Raise CheckpointError that lists the first of `problems`, mismatches of tensors and config, if there are any."""
    if problems:
        raise CheckpointError(
            f"{where}: the weights do not fit config.json: {_first_of(sorted(problems))}. Restore the two files that belong "
            "together"
        )


def _first_of(problems: Sequence[str], most: int = 5) -> str:
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


@torch.no_grad()
def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has neither NaN nor infinity; True for an empty one and on the meta device."""
    # aminmax propagates NaN. It takes one pass, and no copy of the tensor's size.
    return not tensor.numel() or tensor.is_meta or all(bool(end.isfinite()) for end in torch.aminmax(tensor))


def choose_device(device: str | None = None) -> str:
    """Return `device`, by default "cuda" if available, else "cpu". Raises ValueError as `check_device`."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    return device


def check_device(device: str | torch.device) -> None:
    """Raise ValueError, listing this machine's devices, unless a tensor can be put on `device` and read back."""
    try:
        torch.zeros(1, device=torch.device(device)).tolist()
    except Exception as error:  # its type depends on why the device is missing
        found = ["cpu"]
        if torch.cuda.is_available():
            found += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            found += ["mps"]
        raise ValueError(f"device {str(device)!r} is not there; this machine has {', '.join(found)}") from error
