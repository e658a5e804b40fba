"""The token file: size, reproducible bytes, damaged and foreign files."""

import json
from dataclasses import asdict, replace

from larp.codec import token_file
from larp.codec.token_file import TokenFileError, TokenHeader, TokenizedVideo, pack, unpack
from larp.models.tokenizer import LarpTokenizer
from tests.larp.models.test_tokenizer import tiny

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

HEADER = TokenHeader("runs/x", "ab" * 32, 1000, 128, 16, 64, 64, 90, 29.97, "crop", 240, 320)


def video(lengths=(128, 1, 77, 128, 3, 128), **changes) -> TokenizedVideo:
    codes = torch.randint(1000, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    return TokenizedVideo(replace(HEADER, **changes), codes, torch.tensor(lengths))


@pytest.mark.parametrize("bits", [1, 3, 10, 13, 16, 20])
@pytest.mark.parametrize("count", [1, 7, 8, 100, 70_000])
def test_packing_is_lossless_and_minimal(bits, count):
    codes = np.random.default_rng(0).integers(0, 1 << bits, count)
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8 and len(packed) == -(-count * bits // 8)
    assert np.array_equal(unpack(packed, bits, count), codes)


def test_save_load_round_trip(tmp_path):
    first = video(variant="ema")
    path = first.save(tmp_path / "new" / "a.larp")
    again = TokenizedVideo.load(path)
    assert again.header == first.header and torch.equal(again.codes, first.codes)
    assert [len(window) for window in again.windows] == [128, 1, 77, 128, 3, 128]
    assert [file.name for file in path.parent.iterdir()] == ["a.larp"]


def test_the_bytes_are_reproducible_and_few(tmp_path):
    contents = {video().save(tmp_path / f"{k}.larp").read_bytes() for k in range(20)}
    assert len(contents) == 1
    assert len(contents.pop()) < 465 * 10 / 8 + 1000


@pytest.mark.parametrize("length", [0, 5, 8, 9, 200, -1])
def test_a_truncated_file_is_an_error(tmp_path, length):
    path = video().save(tmp_path / "a.larp")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(TokenFileError, match=r"a.larp is (damaged or cut short|not a token file)"):
        TokenizedVideo.load(path)


def test_any_changed_bit_is_an_error(tmp_path):
    path = video().save(tmp_path / "a.larp")
    data = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(data), 150):
        bad = bytearray(data)
        bad[place] ^= 1 << int(place) % 7
        path.write_bytes(bad)
        with pytest.raises(TokenFileError, match=r"a.larp"):
            TokenizedVideo.load(path)


def test_other_files_are_an_error(tmp_path):
    with pytest.raises(TokenFileError, match=r"none.larp: no such file"):
        TokenizedVideo.load(tmp_path / "none.larp")
    with pytest.raises(TokenFileError, match=r"is not a file"):
        TokenizedVideo.load(tmp_path)
    (tmp_path / "a.larp").write_bytes(b"\x00\x00\x00\x20ftypisom" * 20)
    with pytest.raises(TokenFileError, match=r"a.larp is not a token file of larp-mllm tokenize"):
        TokenizedVideo.load(tmp_path / "a.larp")
    save_file({"weight": np.zeros(3)}, tmp_path / "b.larp")
    with pytest.raises(TokenFileError, match=r"b.larp is not a token file.*other tensors"):
        TokenizedVideo.load(tmp_path / "b.larp")


def test_a_newer_format_asks_for_an_update(tmp_path, monkeypatch):
    monkeypatch.setattr(token_file, "FORMAT", 2)
    path = video().save(tmp_path / "a.larp")
    monkeypatch.undo()
    with pytest.raises(TokenFileError, match=r"a.larp has format 2; this version reads up to 1: update larp"):
        TokenizedVideo.load(path)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"frames": 0}, "frames must be at least 1"),
        ({"frames": 10**15}, "windows of 1 to 128 codes|need .* bytes"),
        ({"fps": 0.0}, "fps"),
        ({"source_height": 10**9}, "source"),
        ({"num_frames": 10**9, "frames": 10**9}, "need 1 bytes"),
        ({"surprise": 1}, "surprise"),
        ({"fit": "zoom"}, "zoom"),
    ],
)
def test_an_inconsistent_header_is_an_error(tmp_path, changes, words):
    """The digest is not a signature: the author of a file can compute it."""
    good, path = video(), tmp_path / "a.larp"
    header = asdict(good.header) | changes
    tensors = {"codes": pack(good.codes.numpy(), 10), "lengths": pack(good.lengths.numpy() - 1, 7)}
    entry = {"format": 1, "header": header, "digest": token_file._digest(header, tensors)}
    save_file(tensors, path, metadata={"larp_video": json.dumps(entry)})
    with pytest.raises(TokenFileError, match=rf"a.larp is damaged.*({words})"):
        TokenizedVideo.load(path)


def test_codes_must_match_the_header():
    with pytest.raises(ValueError, match=r"90 frames need 6 windows of 1 to 128 codes"):
        video(lengths=(128, 128))
    with pytest.raises(ValueError, match=r"between 0 and 9"):
        video(codebook_size=10)


def test_the_name_must_end_in_larp(tmp_path):
    with pytest.raises(TokenFileError, match=r"a.mp4: the name of a token file ends in \.larp, such as a.larp"):
        video().save(tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


def test_the_error_for_another_tokenizer_names_both():
    model = LarpTokenizer(tiny())
    found = model.weight_hash()[:12]
    with pytest.raises(
        TokenFileError,
        match=rf"v.larp was made with .*runs/x, variant ema \(hash abababababab\).*mine.*\(hash {found}\)",
    ):
        video(variant="ema").check_tokenizer(model, "mine", "v.larp")
    right = dict(weight_hash=model.weight_hash(), num_frames=4, height=16, width=24, num_tokens=6, codebook_size=32)
    with pytest.raises(TokenFileError, match=r"v.larp is damaged.*num_frames = 5, the tokenizer has 4"):
        TokenizedVideo(
            replace(HEADER, **right | {"num_frames": 5}), torch.zeros(18).long(), torch.ones(18).long()
        ).check_tokenizer(model, "mine", "v.larp")
    TokenizedVideo(replace(HEADER, **right), torch.zeros(23).long(), torch.ones(23).long()).check_tokenizer(
        model, "mine", "v.larp"
    )
