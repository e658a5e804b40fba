"""Model folders: averaged weights beside the last ones, on disk and on the hub."""

import fnmatch
import json
import shutil
from dataclasses import replace

from larp.hub import CheckpointError, non_default_fields
from larp.models.discriminator import Discriminator, DiscriminatorConfig
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file


def small(seed: int = 0, hidden: int = 16) -> Discriminator:
    torch.manual_seed(seed)
    return Discriminator(DiscriminatorConfig(4, 8, 8, (4, 8, 8), hidden=hidden, depth=1, heads=2))


TINY_TOKENIZER = TokenizerConfig(
    4, 16, 16, (2, 8, 8), num_tokens=4, codebook_size=16, code_dim=4, encoder_width=32, encoder_depth=1, encoder_heads=2,
    decoder_width=32, decoder_depth=1, decoder_heads=2, prior=PriorConfig(depth=1, heads=2, width=16, positions=4),
)  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in a folder; returns the folder of its repository."""
    repository = tmp_path / "hub"

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            repository.mkdir(exist_ok=True)
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path, delete_patterns):
            for path in repository.iterdir():
                if any(fnmatch.fnmatch(path.name, pattern) for pattern in delete_patterns):
                    path.unlink()
            shutil.copytree(folder_path, repository, dirs_exist_ok=True)

    def snapshot_download(name, allow_patterns):
        fetched = tmp_path / "fetched"
        shutil.rmtree(fetched, ignore_errors=True)
        fetched.mkdir()
        for pattern in allow_patterns:
            if (repository / pattern).exists():
                shutil.copy(repository / pattern, fetched)
        return fetched

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr("larp.hub_files.check_reachable", lambda *_: None)
    return repository


def test_the_variant_chooses_the_averaged_weights(tmp_path):
    last, averaged = small(0), small(1)
    folder = last.save_pretrained(tmp_path / "m", ema=averaged)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.ema.safetensors",
        "model.safetensors",
    ]
    assert Discriminator.from_pretrained(folder).weight_hash() == last.weight_hash()
    loaded = Discriminator.from_pretrained(folder, variant="ema")
    assert loaded.weight_hash() == averaged.weight_hash() != last.weight_hash() and not loaded.training


def test_averaged_weights_of_another_model_are_deleted(tmp_path):
    small(0).save_pretrained(tmp_path / "m", ema=small(1))
    folder = small(2).save_pretrained(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"model\.ema\.safetensors is missing; load it without a variant.*--ema"):
        Discriminator.from_pretrained(folder, variant="ema")


def test_the_weights_are_as_readable_as_the_config(tmp_path):
    small().save_pretrained(tmp_path, ema=small(1))
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == 3 and len(modes) == 1


def test_an_average_of_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="another config"):
        small().save_pretrained(tmp_path / "m", ema=small(hidden=32))
    assert not (tmp_path / "m").exists()


def test_a_damaged_variant_is_named(tmp_path):
    folder = small().save_pretrained(tmp_path / "m", ema=small(1))
    (folder / "model.ema.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"model\.ema\.safetensors cannot be read"):
        Discriminator.from_pretrained(folder, variant="ema")
    Discriminator.from_pretrained(folder)


def test_the_hub_carries_both(hub):
    last, averaged = small(0), small(1)
    assert last.push_to_hub("me/discriminator", ema=averaged) == "https://hub/me/discriminator"
    assert Discriminator.from_pretrained("me/discriminator").weight_hash() == last.weight_hash()
    assert Discriminator.from_pretrained("me/discriminator", variant="ema").weight_hash() == averaged.weight_hash()
    small(2).push_to_hub("me/discriminator")
    with pytest.raises(CheckpointError, match=r"holds no variant 'ema': model\.ema\.safetensors"):
        Discriminator.from_pretrained("me/discriminator", variant="ema")


def test_the_hash_names_what_differs_from_the_defaults():
    assert non_default_fields(TokenizerConfig()) == {}
    deeper = TokenizerConfig(prior=PriorConfig(depth=2), code_dim=8)
    assert non_default_fields(deeper) == {"code_dim": 8, "prior": {"depth": 2}}
    first, same, other = small(0), small(0), small(0)
    other.config = replace(other.config, heads=1)
    assert first.weight_hash() == same.weight_hash() != other.weight_hash()


def test_the_folder_of_a_run_stands_for_the_model_in_it(tmp_path):
    model = small()
    model.save_pretrained(tmp_path / "run/model", ema=small(1))
    (tmp_path / "run/config.json").write_text('{"data": "shapes:"}')
    assert Discriminator.from_pretrained(tmp_path / "run").weight_hash() == model.weight_hash()
    assert Discriminator.from_pretrained(tmp_path / "run", variant="ema").weight_hash() == small(1).weight_hash()
    (tmp_path / "run/model/model.ema.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.ema\.safetensors is missing"):
        Discriminator.from_pretrained(tmp_path / "run", variant="ema")


def change_weights(folder, **tensors) -> None:
    """Replace tensors by functions of the stored ones ("__" in a name for a dot)."""
    held = load_file(folder / "model.safetensors")
    save_file(
        held | {name.replace("__", "."): change(held) for name, change in tensors.items()},
        folder / "model.safetensors",
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool])
def test_a_tensor_of_another_dtype_is_refused(tmp_path, dtype):
    folder = small().save_pretrained(tmp_path / "m")
    change_weights(folder, fc__weight=lambda held: held["fc.weight"].to(dtype))
    with pytest.raises(CheckpointError, match=rf"fc\.weight is {dtype}, not torch\.float32.*\.float\(\)"):
        Discriminator.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_in_the_weights_are_an_error(tmp_path, value):
    folder = small().save_pretrained(tmp_path / "m")
    change_weights(folder, fc__bias=lambda held: torch.full_like(held["fc.bias"], value))
    with pytest.raises(CheckpointError, match=r"damaged.*fc\.bias has NaN or infinity"):
        Discriminator.from_pretrained(folder)


@pytest.mark.parametrize(
    "text, words",
    [
        ("[]", r"config\.json holds \[\], expected an object"),
        ("3", "holds 3"),
        ("null", "holds None"),
        ('{"model_type": "larp-discriminator", "larp_format": "one"}', "larp_format is 'one'"),
        ('{"model_type": "larp-discriminator", "larp_format": 0}', "larp_format is 0"),
        ('{"model_type": "larp-discriminator", "larp_format": 2}', "update larp"),
        ('{"model_type": "larp-discriminator", "larp_format": true}', "larp_format is True"),
        ("{}", r"config\.json: .*missing"),
    ],
)
def test_a_damaged_config_is_named(tmp_path, text, words):
    folder = small().save_pretrained(tmp_path / "m")
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        Discriminator.from_pretrained(folder)


@pytest.mark.parametrize(
    "hidden, words", [(4 * 10**6, "the weights do not fit config"), (4 * 10**18, "cannot be built")]
)
def test_a_config_that_asks_for_too_much_allocates_nothing(tmp_path, hidden, words):
    folder = small().save_pretrained(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden": hidden}))
    with pytest.raises(CheckpointError, match=words):
        Discriminator.from_pretrained(folder)


def test_a_file_where_the_folder_should_be_is_an_error(tmp_path):
    (tmp_path / "m").write_text("")
    for folder in (tmp_path / "m", tmp_path / "m" / "deeper"):
        with pytest.raises(ValueError, match=r"m.*is a file: give another"):
            small().save_pretrained(folder)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", None, 3.5])
def test_a_device_that_is_not_there_is_named(tmp_path, device):
    folder = small().save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=f"device '{device}' is not there; this machine has cpu"):
        Discriminator.from_pretrained(folder, device=device)


def test_an_upload_without_a_network_says_so(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", offline)
    with pytest.raises(
        CheckpointError, match=r"me/discriminator could not be uploaded.*ConnectionError: no route\).*token"
    ):
        small().push_to_hub("me/discriminator")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_stored_in_16_bits_are_float32_again_and_half_as_large(tmp_path, dtype):
    model = LarpTokenizer(TINY_TOKENIZER)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "half", dtype=dtype)
    again = LarpTokenizer.from_pretrained(tmp_path / "half")
    for name, value in model.named_parameters():
        stored = value if "embedding" in name else value.to(dtype).float()
        assert torch.equal(again.state_dict()[name], stored), name
    assert torch.equal(again.encoder_positions, model.encoder_positions)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.8 * sizes[1]
    again.save_pretrained(tmp_path / "again")
    assert LarpTokenizer.from_pretrained(tmp_path / "again").weight_hash() == again.weight_hash()


def test_an_unknown_dtype_of_the_file_is_refused(tmp_path):
    folder = LarpTokenizer(TINY_TOKENIZER).save_pretrained(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "int8"}))
    with pytest.raises(CheckpointError, match="dtype is 'int8', expected one of float32, bfloat16, float16"):
        LarpTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(("said", "named"), [({}, "float32"), ({"dtype": "float16"}, "float16")])
def test_a_dtype_of_the_config_that_is_not_the_files_is_named(tmp_path, said, named):
    folder = small().save_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config | said))
    with pytest.raises(CheckpointError, match=rf'config\.json says {named} where it must say "dtype": "bfloat16"'):
        Discriminator.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16", "torch.bfloat16"])
def test_a_model_is_loaded_in_the_wanted_dtype(tmp_path, dtype):
    folder = LarpTokenizer(TINY_TOKENIZER).save_pretrained(tmp_path)
    whole, half = LarpTokenizer.from_pretrained(folder), LarpTokenizer.from_pretrained(folder, dtype=dtype)
    assert (whole.dtype, whole.device) == (torch.float32, torch.device("cpu"))
    assert half.dtype == (torch.float16 if dtype == "float16" else torch.bfloat16)
    assert {name for name, p in half.named_parameters() if p.dtype != half.dtype} == {"quantizer.embedding.weight"}
    assert torch.equal(half.codebook, whole.codebook)
    codes = half.encode(torch.rand(1, 3, 4, 16, 16))
    torch.testing.assert_close(half.decode(codes), whole.decode(codes), rtol=0, atol=0.02)


def test_the_names_of_transformers_are_taken_and_others_refused(tmp_path):
    folder = LarpTokenizer(TINY_TOKENIZER).save_pretrained(tmp_path / "m")
    half = LarpTokenizer.from_pretrained(pretrained_model_name_or_path=folder, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and LarpTokenizer.from_pretrained(path=folder).dtype == torch.float32
    with pytest.raises(TypeError, match=r"LarpTokenizer\.from_pretrained knows no foo: it takes .*, dtype and variant"):
        LarpTokenizer.from_pretrained(folder, foo=3)
    with pytest.raises(TypeError, match="was given torch_dtype= and what it is the older name of: leave out"):
        LarpTokenizer.from_pretrained(folder, dtype="float16", torch_dtype="float16")
    with pytest.raises(TypeError, match="was given no model: give a folder"):
        LarpTokenizer.from_pretrained(dtype="float16")


def test_the_stored_dtype_is_had_by_auto(tmp_path):
    folder = small().save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert Discriminator.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16
    assert Discriminator.from_pretrained(folder).dtype == torch.float32
    for wrong in ("int8", torch.int8, "half a float", 16):
        with pytest.raises(
            ValueError, match=r"dtype is .*: give a floating-point one such as torch\.bfloat16, or 'auto'"
        ):
            Discriminator.from_pretrained(folder, dtype=wrong)


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}, "auto", None])
def test_a_device_map_is_one_device(tmp_path, device_map):
    folder = small().save_pretrained(tmp_path)
    expected = "cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu"
    assert Discriminator.from_pretrained(folder, device_map=device_map).device.type == expected


def test_a_device_map_that_splits_the_model_is_refused(tmp_path):
    folder = small().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the model is never split: give a device"):
        Discriminator.from_pretrained(folder, device_map={"blocks": 0, "head": 1})
    with pytest.raises(ValueError, match="device is 'meta' and device_map 'cpu': give one of the two"):
        Discriminator.from_pretrained(folder, device="meta", device_map="cpu")
    with pytest.raises(ValueError, match="device 'balanced' is not there"):
        Discriminator.from_pretrained(folder, device_map="balanced")


def test_a_model_in_a_subfolder(tmp_path, monkeypatch):
    model = small()
    model.save_pretrained(tmp_path / "video/discriminator", ema=small(1))

    def snapshot_download(name, allow_patterns):
        assert allow_patterns == ["video/discriminator/config.json", "video/discriminator/model.ema.safetensors"]
        return str(tmp_path)

    assert Discriminator.from_pretrained(tmp_path, subfolder="video/discriminator").weight_hash() == model.weight_hash()
    with pytest.raises(CheckpointError, match="has no subfolder 'vae': leave it out"):
        Discriminator.from_pretrained(tmp_path, subfolder="vae")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr("larp.hub_files.check_reachable", lambda *_: None)
    averaged = Discriminator.from_pretrained("me/models", subfolder="video/discriminator", variant="ema")
    assert averaged.weight_hash() == small(1).weight_hash()
