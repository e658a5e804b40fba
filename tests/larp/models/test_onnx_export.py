"""ONNX models of the tokenizer: onnxruntime gives the codes and clips that torch gives."""

import importlib.util

from larp.models.growing import with_refiner
from larp.models.onnx_export import export_onnx
from larp.models.tokenizer import LarpTokenizer
from tests.larp_mllm.tiny import tiny_video_tokenizer

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def exported(golden_root, tmp_path_factory):
    """The golden tokenizer, its values, and a function that runs a model by name."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="needs pip install 'larp-mllm[onnx]'")
    runtime = pytest.importorskip("onnxruntime", reason="needs pip install 'larp-mllm[onnx]'")
    folder = golden_root / "official_tokenizer"
    model = LarpTokenizer.from_pretrained(folder)
    paths = export_onnx(model, tmp_path_factory.mktemp("onnx"))
    sessions = {path.stem: runtime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in paths}

    def run(name: str, x: torch.Tensor) -> torch.Tensor:
        given = sessions[name].get_inputs()[0].name
        return torch.from_numpy(sessions[name].run(None, {given: x.numpy()})[0])

    return model, load_file(folder / "expected.safetensors"), run, sessions


@pytest.mark.slow
def test_onnxruntime_gives_the_golden_codes_and_clips(exported):
    model, want, run, _ = exported
    assert torch.equal(run("encode", want["clip"]), want["codes"])
    torch.testing.assert_close(run("decode", want["codes"]), model.decode(want["codes"]), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_any_number_of_clips_and_what_the_files_say(exported):
    model, want, run, sessions = exported
    for rows in (1, 5):
        clips = torch.cat([want["clip"][:1]] * rows)
        assert torch.equal(run("encode", clips), model.encode(clips))
        assert run("decode", model.encode(clips)).shape == clips.shape
    for name, given, result in (("encode", "clip", "codes"), ("decode", "codes", "clip")):
        session = sessions[name]
        assert [x.name for x in (*session.get_inputs(), *session.get_outputs())] == [given, result]
        assert session.get_inputs()[0].shape[0] == "batch"
        assert session.get_modelmeta().custom_metadata_map["larp.weight_hash"] == model.weight_hash()


def test_a_missing_package_and_other_weights_are_named(golden_root, tmp_path, monkeypatch):
    model = LarpTokenizer.from_pretrained(golden_root / "official_tokenizer")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else found(name))
    with pytest.raises(ValueError, match=r"onnx and onnxscript: pip install 'larp-mllm\[onnx\]'"):
        export_onnx(model, tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match=r"in torch\.bfloat16 on cpu: load it in float32"):
        export_onnx(model.bfloat16(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_written_are_refused_before_the_work(golden_root, tmp_path, monkeypatch):
    model = LarpTokenizer.from_pretrained(golden_root / "official_tokenizer")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("worked for minutes"))
    (tmp_path / "decode.onnx").mkdir()
    (tmp_path / "file").touch()
    for folder, words in ((tmp_path, r"decode\.onnx is a folder"), (tmp_path / "file", "is a file, not a folder")):
        with pytest.raises(ValueError, match=words):
            export_onnx(model, folder)


@pytest.mark.slow
def test_a_refiner_is_exported_as_well(tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="needs pip install 'larp-mllm[onnx]'")
    runtime = pytest.importorskip("onnxruntime", reason="needs pip install 'larp-mllm[onnx]'")
    tokenizer = with_refiner(tiny_video_tokenizer(), 8).eval()
    for layer in (tokenizer.head, tokenizer.refiner.last):
        torch.nn.init.normal_(layer.weight, std=0.1)
    export_onnx(tokenizer, tmp_path)
    session, codes = (
        runtime.InferenceSession(tmp_path / "decode.onnx", providers=["CPUExecutionProvider"]),
        torch.randint(16, (3, 4)),
    )
    (clip,) = session.run(None, {"codes": codes.numpy()})
    torch.testing.assert_close(torch.from_numpy(clip), tokenizer.decode(codes), rtol=1e-5, atol=1e-5)
