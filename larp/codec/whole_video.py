"""Encoding and decoding whole videos of any length and size, window by window, in the memory of a few windows.

Every frame is resized to the tokenizer's frame size (see `larp.codec.fitting`). Each T consecutive frames form a window. The last
window is padded by repeating its last frame, and the padding is removed after decoding. A still image is a video of one frame.
The output has the video's frame rate. A token
file of a varying one holds the average.

Shapes: B windows at a time, T frames, H, W pixels of the tokenizer's frame, n codes of a window, N at most, K codebook size.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

from larp.codec.fitting import Fit, Fitting
from larp.codec.token_file import TokenHeader, TokenizedVideo
from larp.config import check_count
from larp.data.audio import AudioTrack
from larp.data.clips import clip_to_frames, pixels_to_clip
from larp.data.open_video import opened
from larp.data.video import VideoInfo, VideoWriter, holds_uneven_times, iter_frames, probe
from larp.models.tokenizer import LarpTokenizer, shortest_lengths

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

# Margin above the target PSNR, in dB, because another batch size rounds differently.
_PSNR_MARGIN = 1e-3


@dataclass(frozen=True)
class Encoding:
    """Options of encoding a video."""

    fit: Fit = "crop"
    """How frames are resized, see `larp.codec.fitting`."""
    num_tokens: int | None = None
    """Codes per window (nested tokenizers only); by default N."""
    target_psnr: float | None = None
    """PSNR in dB for which each window gets the fewest codes, N at most (nested tokenizers only). Bars and padding do not
    count."""
    batch_size: int = 8
    """Windows at a time."""

    def __post_init__(self):
        if self.num_tokens is not None and self.target_psnr is not None:
            raise ValueError("give num_tokens or target_psnr, not both")
        check_count("batch_size", self.batch_size)

    def check(self, tokenizer: LarpTokenizer) -> None:
        """Raise ValueError unless the tokenizer supports these options."""
        if self.num_tokens is not None:
            tokenizer.check_length(self.num_tokens)
        if self.target_psnr is not None:
            tokenizer.check_length(1)
            if not self.target_psnr > 0:
                raise ValueError(f"target_psnr must be a positive number of dB, got {self.target_psnr}")


@dataclass(frozen=True)
class Report:
    """Size, bit rate and quality of a reconstructed video."""

    frames: int
    fps: float
    height: int
    """Of the output, in pixels."""
    width: int
    """Of the output, in pixels."""
    windows: int
    codes: int
    bits: float
    """codes * log2(K)."""
    bits_per_pixel: float
    """bits / (frames * H * W), without the bars of `pad`."""
    tokens_per_second: float
    """Codes per second of video."""
    psnr: float
    """In dB, from the mean squared error over the same pixels."""
    notes: tuple[str, ...]
    """Losses to report, for example sound that the container does not support."""


def tokenize_video(
    path: str | Path,
    tokenizer: LarpTokenizer,
    encoding: Encoding | None = None,
    *,
    name: str = "",
    variant: str | None = None,
) -> TokenizedVideo:
    """Encode a video file of any length and size; `.save("video.larp")` of the result writes a token file.

    `name` and `variant` of the tokenizer are stored in the header. Raises VideoError for a file that cannot be decoded to its
    end, ValueError for options that the tokenizer does not support.
    """
    source, frames, codes = Source.open(path, tokenizer, encoding or Encoding()), 0, []
    for batch in source.batches("tokenizing"):
        frames += sum(batch.lengths)
        codes += batch.codes
    header = source.header(frames, name, variant)
    return TokenizedVideo(header, torch.cat(codes), torch.tensor([len(window) for window in codes]))


def detokenize_video(
    video: TokenizedVideo,
    tokenizer: LarpTokenizer,
    out: str | Path,
    *,
    original_size: bool = False,
    batch_size: int = 8,
    name: str = "the given tokenizer",
    where: str | Path = "the tokenized video",
) -> Path:
    """Decode a video and write it without sound; return its path.

    Args:
        original_size: remove bars and resize to the source size; by default frames have the tokenizer's size.
        batch_size: windows at a time.
        name, where: the tokenizer and the token file, for the error message.

    Raises TokenFileError if the codes were made with another tokenizer.
    """
    check_count("batch_size", batch_size)
    video.check_tokenizer(tokenizer, name, where)
    header, left = video.header, video.header.frames
    with VideoWriter(out, header.fps) as writer, _progress(header.frames, "detokenizing") as bar:
        for windows in _batched(video.windows, batch_size):
            for clip in decode_windows(tokenizer, windows):
                length = min(left, header.num_frames)
                _write(writer, clip_to_frames(clip[:, :length]), header.fitting if original_size else None)
                left -= length
                bar.update(length)
    return Path(out)


def reconstruct_video(
    path: str | Path,
    out: str | Path,
    tokenizer: LarpTokenizer,
    encoding: Encoding | None = None,
    *,
    original_size: bool = False,
) -> Report:
    """Encode and decode a video file and write the result, each frame at its time, with the original sound.

    What the container cannot hold of times and sound is left out with a note.

    `original_size` is as in `detokenize_video`. Raises the errors of `tokenize_video`, and ValueError if `out` is the video
    itself; no file is written then.
    """
    check_paths(path, out)
    source = Source.open(path, tokenizer, encoding or Encoding())
    fitting, totals = source.fitting, _Totals()
    notes = []
    if not source.info.even and not holds_uneven_times(out):
        notes.append(f"the frames come at uneven times: written at their average of {source.info.fps:.4g} a second")
    times = source.info.times.seconds
    with AudioTrack(path) as audio, VideoWriter(out, source.info.fps, audio=audio, seconds=times) as writer:
        for batch in source.batches("reconstructing"):
            clips = decode_windows(tokenizer, batch.codes)
            for pixels, codes, clip, length in zip(batch.pixels, batch.codes, clips, batch.lengths, strict=True):
                totals.add(source, pixels_to_clip(pixels[:length]), clip[:, :length].cpu(), len(codes))
                _write(writer, clip_to_frames(clip[:, :length]), fitting if original_size else None)
    return totals.report(source, fitting.visible_size if original_size else fitting.frame, (*notes, *audio.notes))


def check_paths(path: str | Path, out: str | Path) -> None:
    """Raise VideoError unless `path` starts like a video file, ValueError if `out` is the same file. For use before long work."""
    with opened(path):
        pass
    if Path(out).exists() and Path(out).samefile(path):
        raise ValueError(f"{out} is the video itself: give another name for the output")


@dataclass(frozen=True)
class Batch:
    """B encoded windows."""

    pixels: np.ndarray
    """uint8 (B, T, H, W, 3)."""
    lengths: list[int]
    """Frames of each window without padding."""
    codes: list[Tensor]
    """Codes of each window, (n,) int64 on the CPU."""


@dataclass(frozen=True)
class Source:
    """A video file to encode."""

    path: Path
    info: VideoInfo
    fitting: Fitting
    tokenizer: LarpTokenizer
    encoding: Encoding

    @classmethod
    def open(cls, path: str | Path, tokenizer: LarpTokenizer, encoding: Encoding) -> "Source":
        """Read the properties of a file. Raises VideoError, or ValueError if size or tokenizer do not allow the encoding."""
        encoding.check(tokenizer)
        info = probe(path)
        try:
            fitting = Fitting(encoding.fit, (info.height, info.width), tokenizer.config.clip_shape[1:])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return cls(Path(path), info, fitting, tokenizer, encoding)

    def batches(self, what: str) -> Iterator[Batch]:
        """Yield encoded windows, with a progress bar titled `what`. Raises VideoError if decoding fails."""
        length = self.tokenizer.config.num_frames
        with _progress(self.info.frames, what) as bar:
            fitted = (self.fitting.apply(frame[None])[0] for frame in iter_frames(self.path))
            for windows in _batched(cut_windows(fitted, length), self.encoding.batch_size):
                pixels, lengths = np.stack([frames for frames, _ in windows]), [length for _, length in windows]
                yield Batch(pixels, lengths, self._encode(pixels, lengths))
                bar.update(sum(lengths))

    def _encode(self, pixels: np.ndarray, lengths: list[int]) -> list[Tensor]:
        clip = torch.stack([pixels_to_clip(frames) for frames in pixels]).to(self.tokenizer.codebook.device)
        codes = self.tokenizer.encode(clip, self.encoding.num_tokens)
        prefixes = torch.full((len(codes),), codes.shape[1])
        if self.encoding.target_psnr is not None:
            region = self.fitting.region
            prefixes = shortest_prefixes(self.tokenizer, clip, codes, self.encoding.target_psnr, region, lengths)
        return [row[:prefix].cpu() for row, prefix in zip(codes, prefixes.tolist(), strict=True)]

    def header(self, frames: int, name: str, variant: str | None) -> TokenHeader:
        """Return the header of a token file of this video with `frames` frames."""
        c, info = self.tokenizer.config, self.info
        return TokenHeader(
            tokenizer=name,
            weight_hash=self.tokenizer.weight_hash(),
            codebook_size=c.codebook_size,
            num_tokens=c.num_tokens,
            num_frames=c.num_frames,
            height=c.height,
            width=c.width,
            frames=frames,
            fps=info.fps,
            fit=self.encoding.fit,
            source_height=info.height,
            source_width=info.width,
            variant=variant,
        )


def cut_windows(frames: Iterable[np.ndarray], length: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield windows (length, H, W, 3) of frames (H, W, 3), each with its number of frames without padding.

    The last window is padded by repeating its last frame.
    """
    for window in _batched(frames, length):
        yield np.stack(window + [window[-1]] * (length - len(window))), len(window)


def decode_windows(tokenizer: LarpTokenizer, windows: Sequence[Tensor]) -> Tensor:
    """Decode the codes of B windows, (n,) each, n varying if nested, to clips (B, 3, T, H, W) in [0, 1]."""
    return torch.cat([tokenizer.decode(torch.stack(list(group))) for _, group in groupby(windows, key=len)])


@torch.inference_mode()
def shortest_prefixes(
    tokenizer: LarpTokenizer,
    clips: Tensor,
    codes: Tensor,
    target_psnr: float,
    region: tuple[slice, slice],
    frames: Sequence[int],
) -> Tensor:
    """Return the number of codes (B, N) with which each window (B, 3, T, H, W) has `target_psnr` dB: (B,) int64.

    Like `LarpTokenizer.shortest_prefix`, but over the rows and columns of `region` and the first `frames` (B,) frames. Every
    length below N was verified to reach the target.
    """
    latents, counts = tokenizer.quantizer.lookup(codes), torch.tensor(frames, device=codes.device)
    real = torch.arange(clips.shape[2], device=codes.device) < counts[:, None]

    def reached(lengths: Tensor) -> Tensor:
        decoded = tokenizer.decode_latents(tokenizer.mask(latents, lengths)).float().clamp(0, 1)
        errors = (clips[..., *region].float() - decoded[..., *region]).square().mean((1, 3, 4))
        error = torch.where(real, errors, 0).sum(1) / counts
        return -10 * error.clamp(min=1e-10).log10() >= target_psnr + _PSNR_MARGIN

    return shortest_lengths(reached, codes)


@dataclass
class _Totals:
    """Sums over the windows of a video."""

    error: float = 0.0
    values: int = 0
    frames: int = 0
    windows: int = 0
    codes: int = 0
    missed: int = 0
    """Windows below the target PSNR."""

    def add(self, source: Source, clip: Tensor, decoded: Tensor, codes: int) -> None:
        inside = (..., *source.fitting.region)
        error, values = (clip[inside].double() - decoded[inside].double()).square().sum().item(), clip[inside].numel()
        target = source.encoding.target_psnr
        self.missed += target is not None and _psnr(error, values) < target
        self.error, self.values, self.frames = self.error + error, self.values + values, self.frames + clip.shape[1]
        self.windows, self.codes = self.windows + 1, self.codes + codes

    def report(self, source: Source, size: tuple[int, int], notes: tuple[str, ...]) -> Report:
        bits = self.codes * math.log2(source.tokenizer.codebook_size)
        if self.missed:
            target = source.encoding.target_psnr
            notes = (*notes, f"{self.missed} of {self.windows} windows stay under the target of {target:g} dB")
        return Report(
            frames=self.frames,
            fps=source.info.fps,
            height=size[0],
            width=size[1],
            windows=self.windows,
            codes=self.codes,
            bits=bits,
            bits_per_pixel=bits / (self.values / 3),
            tokens_per_second=self.codes * source.info.fps / self.frames,
            psnr=_psnr(self.error, self.values),
            notes=notes,
        )


def _psnr(error: float, values: int) -> float:
    """Return the PSNR in dB of a sum of squared errors over `values` values, at most 100 as in `larp.models.losses.psnr`."""
    return -10 * math.log10(max(error / values, 1e-10))


def _write(writer: VideoWriter, frames: np.ndarray, fitting: Fitting | None) -> None:
    if fitting is None:
        writer.write(frames)
    else:
        for frame in frames:  # one by one, because source frames may be much larger than the tokenizer's
            writer.write(fitting.undo(frame[None]))


def _batched(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def _progress(frames: int, what: str) -> tqdm:
    return tqdm(total=frames, desc=what, unit="frame", delay=1, leave=False)
