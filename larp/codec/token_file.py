"""The token file (.larp): a whole video as codes of a tokenizer.

It is a safetensors file with the tensors

    codes     uint8, the concatenated codes of all windows, ceil(log2 K) bits each
    lengths   uint8, the number of codes of each window minus 1, ceil(log2 N) bits each

and one metadata entry, a JSON object of the format version, the header, and a digest of header and tensors. The same video and
tokenizer give the same bytes.

Shapes: W windows, T frames of a window, N codes of a window at most, K codebook size, M codes in all.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from larp.codec.fitting import Fit, Fitting
from larp.config import check_positive, from_dict
from larp.files import replacing
from larp.models.tokenizer import LarpTokenizer

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

FORMAT = 1
SUFFIX = ".larp"
_ENTRY = "larp_video"
_BLOCK = 1 << 16  # codes packed at a time; a multiple of 8, so that every block ends at a byte boundary


class TokenFileError(ValueError):
    """A token file that cannot be read or written, or was made with another tokenizer."""


@dataclass(frozen=True)
class TokenHeader:
    """The tokenizer and the video that the codes were made from."""

    tokenizer: str
    """Name or path of the tokenizer, as given."""
    weight_hash: str
    """`weight_hash()` of the tokenizer, the only one that can decode the codes."""
    codebook_size: int
    """K."""
    num_tokens: int
    """N."""
    num_frames: int
    """T."""
    height: int
    """Frame height of the tokenizer, in pixels."""
    width: int
    """Frame width of the tokenizer, in pixels."""
    frames: int
    """Frames of the video, without the padding of the last window."""
    fps: float
    """Frames per second."""
    fit: Fit
    """How frames were resized, see `larp.codec.fitting`."""
    source_height: int
    """Height of the video, in pixels."""
    source_width: int
    """Width of the video, in pixels."""
    variant: str | None = None
    """Variant of the tokenizer's weights, see `LarpTokenizer.from_pretrained`."""

    def __post_init__(self):
        check_positive(self, "codebook_size", "num_tokens", "num_frames", "frames")
        if not 0 < self.fps <= 1000:
            raise ValueError(f"fps must be in (0, 1000], got {self.fps}")
        _ = self.fitting  # checks fit and sizes

    @property
    def fitting(self) -> Fitting:
        """The mapping between the video's and the tokenizer's frame size."""
        return Fitting(self.fit, (self.source_height, self.source_width), (self.height, self.width))

    @property
    def windows(self) -> int:
        """W, including a padded last window."""
        return -(-self.frames // self.num_frames)


@dataclass(frozen=True, eq=False)
class TokenizedVideo:
    """The codes of a whole video. Raises ValueError if they do not match the header."""

    header: TokenHeader
    codes: Tensor
    """int64 (M,) in [0, K), all windows concatenated."""
    lengths: Tensor
    """int64 (W,), number of codes of each window, 1 to N."""

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
        """Write the token file atomically and return its path, which must end in .larp."""
        path, h = Path(path), self.header
        check_suffix(path)
        tensors = {
            "codes": pack(self.codes.numpy(), code_bits(h.codebook_size)),
            "lengths": pack(self.lengths.numpy() - 1, code_bits(h.num_tokens)),
        }
        values = asdict(h)
        # One entry, because safetensors writes several in an order that changes from run to run.
        entry = {"format": FORMAT, "header": values, "digest": _digest(values, tensors)}
        with replacing(path) as part:
            part.write_bytes(save(tensors, metadata={_ENTRY: json.dumps(entry, sort_keys=True)}))
        return path

    @classmethod
    def load(cls, path: str | Path) -> "TokenizedVideo":
        """Read a token file. Raises TokenFileError if it is not one, damaged, or of a newer format."""
        path = Path(path)
        entry, tensors = _read(path)
        if entry.get("format") not in range(1, FORMAT + 1):
            raise TokenFileError(
                f"{path} has format {entry.get('format')!r}; this version reads up to {FORMAT}: update larp"
            )
        try:
            if _digest(entry["header"], tensors) != entry["digest"]:
                raise ValueError("its digest does not match")
            header = from_dict(TokenHeader, entry["header"], "its header")
            lengths = unpack(tensors["lengths"], code_bits(header.num_tokens), header.windows) + 1
            codes = unpack(tensors["codes"], code_bits(header.codebook_size), int(lengths.sum()))
            return cls(header, torch.from_numpy(codes), torch.from_numpy(lengths))
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from error

    def check_tokenizer(self, tokenizer: LarpTokenizer, name: str, where: str | Path) -> None:
        """Raise TokenFileError unless the codes were made with `tokenizer`; `name` and `where` (the file) are for the message."""
        h, found = self.header, tokenizer.weight_hash()
        if found != h.weight_hash:
            made = _describe(h.tokenizer, h.variant)
            raise TokenFileError(
                f"{where} was made with the tokenizer {made} (hash {h.weight_hash[:12]}), but {name} is another (hash "
                f"{found[:12]}): give the one that the file was made with"
            )
        for key in ("codebook_size", "num_tokens", "num_frames", "height", "width"):
            if getattr(h, key) != getattr(tokenizer.config, key):
                error = ValueError(f"{key} = {getattr(h, key)}, the tokenizer has {getattr(tokenizer.config, key)}")
                raise _damaged(Path(where), error)


def check_suffix(path: Path) -> None:
    """Raise TokenFileError unless `path` ends in .larp."""
    if path.suffix.lower() != SUFFIX:
        raise TokenFileError(
            f"{path}: the name of a token file ends in {SUFFIX}, such as {path.stem or 'video'}{SUFFIX}"
        )


def code_bits(size: int) -> int:
    """Return the bits per code for `size` different codes: ceil(log2(size)), at least 1."""
    return max(1, (size - 1).bit_length())


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes (M,), integers in [0, 2**bits), into uint8 (ceil(M * bits / 8),), highest bit first."""
    places = np.arange(bits - 1, -1, -1, dtype=np.int64)
    blocks = (codes[start : start + _BLOCK, None] >> places & 1 for start in range(0, len(codes), _BLOCK))
    return np.concatenate([np.packbits(block.astype(np.uint8)) for block in blocks])


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Unpack `count` codes of `pack`, int64 (count,). Raises ValueError unless `packed` has the expected length."""
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
    """Return the metadata entry and the tensors of a token file."""
    if not path.is_file():
        raise TokenFileError(f"{path}: no such file" if not path.exists() else f"{path} is not a file")
    with open(path, "rb") as file:
        head = file.read(9)
    if not head.startswith(b"{", 8):
        raise TokenFileError(f"{path} is not a token file of larp-mllm tokenize")
    try:
        with safe_open(path, framework="numpy") as file:
            entry = (file.metadata() or {}).get(_ENTRY)
            tensors = {} if entry is None else {name: file.get_tensor(name) for name in ("codes", "lengths")}
        if entry is not None:
            return dict(json.loads(entry)), tensors
    except (SafetensorError, ValueError, TypeError) as error:
        raise _damaged(path, error) from error
    raise TokenFileError(f"{path} is not a token file of larp-mllm tokenize: it has other tensors")


def _damaged(path: Path, error: Exception) -> TokenFileError:
    return TokenFileError(f"{path} is damaged or cut short ({error}): copy it again, or tokenize the video again")


def _describe(tokenizer: str, variant: str | None) -> str:
    return (tokenizer or "without a name") + (f", variant {variant}" if variant else "")
