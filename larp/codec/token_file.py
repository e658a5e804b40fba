"""The token file: a whole video as the codes of a tokenizer, in one small file (.larp).

A safetensors file, so no pickle, with the tensors

    codes     uint8, the codes of all windows one after the other, each in ceil(log2 K) bits
    lengths   uint8, how many codes each window has, less one, each in ceil(log2 N) bits

and one metadata entry: JSON of the format's version, the header, and a digest of all the rest. The same video and the
same tokenizer give the same bytes.

Shapes: W windows, T frames of a window, N codes of a window at most, K codebook size, M codes in all.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from larp.codec.fitting import Fit, Fitting
from larp.config import from_dict
from larp.models.tokenizer import LarpTokenizer

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

FORMAT = 1
SUFFIX = ".larp"
_ENTRY = "larp_video"
_BLOCK = 1 << 16  # codes packed at a time: a multiple of 8, so that a block ends with a byte


class TokenFileError(ValueError):
    """A token file that cannot be read or written, or belongs to another tokenizer; the message says which and why."""


@dataclass(frozen=True)
class TokenHeader:
    """What the codes of a video were made from."""

    tokenizer: str
    """Name or path of the tokenizer, as it was given."""
    weight_hash: str
    """Its `weight_hash`: the one tokenizer that can read the codes."""
    codebook_size: int
    """K."""
    num_tokens: int
    """N."""
    num_frames: int
    """T."""
    height: int
    """Of the tokenizer's frame."""
    width: int
    frames: int
    """Of the video, without what completed the last window."""
    fps: float
    """Frames per second."""
    fit: Fit
    """How the pictures were brought into the tokenizer's frame, see `larp.codec.fitting`."""
    source_height: int
    """Of the video's own pictures."""
    source_width: int
    variant: str | None = None
    """Of the tokenizer's weights; see `LarpTokenizer.from_pretrained`."""

    def __post_init__(self):
        for name in ("codebook_size", "num_tokens", "num_frames", "frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.fps <= 1000:
            raise ValueError(f"fps must be in (0, 1000], got {self.fps}")
        _ = self.fitting

    @property
    def fitting(self) -> Fitting:
        """The way from the video's pictures into the tokenizer's frame, and back."""
        return Fitting(self.fit, (self.source_height, self.source_width), (self.height, self.width))

    @property
    def windows(self) -> int:
        """W; the last window may have been completed."""
        return -(-self.frames // self.num_frames)


@dataclass(frozen=True, eq=False)
class TokenizedVideo:
    """The codes of a whole video: `codes` int64 (M,) in [0, K), `lengths` int64 (W,), codes of each window, 1 to N.

    ValueError if they do not fit the header.
    """

    header: TokenHeader
    codes: Tensor
    lengths: Tensor

    def __post_init__(self):
        h = self.header
        if self.lengths.shape != (h.windows,) or not 1 <= self.lengths.min() <= self.lengths.max() <= h.num_tokens:
            raise ValueError(f"{h.frames} frames need {h.windows} windows of 1 to {h.num_tokens} codes")
        if self.codes.shape != (int(self.lengths.sum()),):
            raise ValueError(f"the windows have {int(self.lengths.sum())} codes, not {tuple(self.codes.shape)}")
        if not 0 <= self.codes.min() <= self.codes.max() < h.codebook_size:
            raise ValueError(f"the codes are not all between 0 and {h.codebook_size - 1}")

    @property
    def windows(self) -> tuple[Tensor, ...]:
        """The codes of each window, (n,)."""
        return self.codes.split(self.lengths.tolist())

    def save(self, path: str | Path) -> Path:
        """Write the token file, whole or not at all; the suffix must be .larp. Returns the path."""
        path, h = Path(path), self.header
        check_suffix(path)
        tensors = {
            "codes": pack(self.codes.numpy(), code_bits(h.codebook_size)),
            "lengths": pack(self.lengths.numpy() - 1, code_bits(h.num_tokens)),
        }
        values = asdict(h)
        # One entry: safetensors writes several in an order that changes from run to run.
        entry = {"format": FORMAT, "header": values, "digest": _digest(values, tensors)}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            part.write_bytes(save(tensors, metadata={_ENTRY: json.dumps(entry, sort_keys=True)}))
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "TokenizedVideo":
        """Read a token file; TokenFileError if it is none, damaged, or of a newer format. No pickle is ever read."""
        path = Path(path)
        entry, tensors = _read(path)
        if entry.get("format") not in range(1, FORMAT + 1):
            raise TokenFileError(
                f"{path} has format {entry.get('format')!r}; this version reads up to {FORMAT}: update larp"
            )
        try:
            if _digest(entry["header"], tensors) != entry["digest"]:
                raise ValueError("its digest is another")
            header = from_dict(TokenHeader, entry["header"], "its header")
            lengths = unpack(tensors["lengths"], code_bits(header.num_tokens), header.windows) + 1
            codes = unpack(tensors["codes"], code_bits(header.codebook_size), int(lengths.sum()))
            return cls(header, torch.from_numpy(codes), torch.from_numpy(lengths))
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from error

    def check_tokenizer(self, tokenizer: LarpTokenizer, name: str, where: str | Path) -> None:
        """TokenFileError unless the codes were made with `tokenizer`; `name` and `where` (the file) are for the message."""
        h, found = self.header, tokenizer.weight_hash()
        if found != h.weight_hash:
            made = _named(h.tokenizer, h.variant)
            raise TokenFileError(
                f"{where} was made with the tokenizer {made} (hash {h.weight_hash[:12]}), and {name} is another (hash "
                f"{found[:12]}), for which the codes mean nothing: give the one that the file was made with"
            )
        for key in ("codebook_size", "num_tokens", "num_frames", "height", "width"):
            if getattr(h, key) != getattr(tokenizer.config, key):
                error = ValueError(f"{key} = {getattr(h, key)}, the tokenizer has {getattr(tokenizer.config, key)}")
                raise _damaged(Path(where), error)


def check_suffix(path: Path) -> None:
    """TokenFileError unless `path` is named like a token file."""
    if path.suffix.lower() != SUFFIX:
        raise TokenFileError(f"{path}: a token file is named *{SUFFIX}, such as {path.stem or 'video'}{SUFFIX}")


def code_bits(size: int) -> int:
    """Bits of one of `size` different codes: ceil(log2(size)), at least 1."""
    return max(1, (size - 1).bit_length())


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (M,), integers in [0, 2**bits) -> uint8 (ceil(M * bits / 8),), the highest bit first."""
    places = np.arange(bits - 1, -1, -1, dtype=np.int64)
    blocks = (codes[start : start + _BLOCK, None] >> places & 1 for start in range(0, len(codes), _BLOCK))
    return np.concatenate([np.packbits(block.astype(np.uint8)) for block in blocks])


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The `count` codes of `pack`, int64 (count,). ValueError unless `packed` is just as long as they need."""
    if packed.dtype != np.uint8 or packed.shape != (-(-count * bits // 8),):
        raise ValueError(f"{count} codes of {bits} bits need {-(-count * bits // 8)} bytes, not {packed.shape}")
    weights = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    codes, step = [], _BLOCK * bits // 8
    for start in range(0, len(packed), step):
        block = np.unpackbits(packed[start : start + step])
        block = block[: len(block) // bits * bits]
        codes.append(block.reshape(-1, bits) @ weights)
    return np.concatenate(codes)[:count]


def _digest(header: dict, tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """The metadata entry and the tensors of a safetensors file."""
    if not path.is_file():
        raise TokenFileError(f"{path}: no such file" if not path.exists() else f"{path} is no file")
    with open(path, "rb") as file:
        head = file.read(9)
    if not head.startswith(b"{", 8):
        raise TokenFileError(f"{path} is no token file of larp-mllm tokenize")
    try:
        with safe_open(path, framework="numpy") as file:
            entry = (file.metadata() or {}).get(_ENTRY)
            tensors = {} if entry is None else {name: file.get_tensor(name) for name in ("codes", "lengths")}
        if entry is not None:
            return dict(json.loads(entry)), tensors
    except (SafetensorError, ValueError, TypeError) as error:
        raise _damaged(path, error) from error
    raise TokenFileError(f"{path} is no token file of larp-mllm tokenize: its tensors are something else")


def _damaged(path: Path, error: Exception) -> TokenFileError:
    return TokenFileError(f"{path} is damaged or cut short ({error}): copy it again, or tokenize the video again")


def _named(tokenizer: str, variant: str | None) -> str:
    return (tokenizer or "without a name") + (f", variant {variant}" if variant else "")
