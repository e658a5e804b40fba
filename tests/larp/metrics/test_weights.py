"""Weight files: search order and hashes."""

import hashlib

from larp.metrics.weights import I3D_STYLEGANV, LPIPS_HEADS, VGG16, WeightFile, WeightsMissing

import pytest


def published(tmp_path, content=b"weights"):
    origin = tmp_path / "origin.pt"
    origin.write_bytes(content)
    return WeightFile("w.pt", "LARP_NO_SUCH", origin.as_uri(), hashlib.sha256(content).hexdigest(), "some weights")


def test_search_order(tmp_path, monkeypatch):
    monkeypatch.setenv("LARP_CACHE", str(tmp_path / "cache"))
    source = published(tmp_path)
    assert source.find() is None
    with pytest.raises(WeightsMissing, match=r"some weights: .*w\.pt.*LARP_NO_SUCH.*larp-mllm fetch"):
        source.locate()
    cached = tmp_path / "cache" / "w.pt"
    cached.parent.mkdir()
    cached.write_bytes(b"weights")
    assert source.locate() == cached and source.verify(cached) == source.sha256
    cached.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"w\.pt: not the published w\.pt"):
        source.verify(cached)
    for name in ("by_variable", "by_argument"):
        (tmp_path / name).write_bytes(b"weights")
    monkeypatch.setenv("LARP_NO_SUCH", str(tmp_path / "by_variable"))
    assert source.locate() == tmp_path / "by_variable"
    assert source.locate(tmp_path / "by_argument") == tmp_path / "by_argument"


def test_published_hashes_have_full_length():
    assert VGG16.sha256.startswith("397923af")  # torchvision puts the beginning into the name
    assert all(len(source.sha256) == 64 for source in (I3D_STYLEGANV, VGG16, LPIPS_HEADS))
