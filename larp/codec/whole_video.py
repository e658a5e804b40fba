"""Whole videos of any length and size through a tokenizer, window by window, in the memory of a few windows.

Every picture is fitted into the tokenizer's frame (see `larp.codec.fitting`), and each T of them, one after the other,
make a window. The last window is completed by repeating its last picture, and what was repeated is cut off again: it
then looks to the tokenizer like every other window, whatever its temporal patch. A picture that does not move, such
as a PNG, is a video of one frame. The output has the video's frame rate; a rate that varies becomes its average.

Shapes: B windows at a time, T frames, H, W pixels of the tokenizer's frame, n codes of a window, K codebook size.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

from larp.codec.fitting import Fit, Fitting
from larp.codec.token_file import TokenHeader, TokenizedVideo
from larp.data.audio import AudioTrack
from larp.data.clips import clip_to_frames, pixels_to_clip
from larp.data.container import opened
from larp.data.video import VideoInfo, VideoWriter, iter_frames, probe
from larp.models.tokenizer import LarpTokenizer, shortest_lengths

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

# In dB. Batches round otherwise, so a window must be found this far above the target to be above it when it is written.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Encoding:
    """How videos are encoded."""

    fit: Fit = "crop"
    """How a picture is brought into the tokenizer's frame, see `larp.codec.fitting`."""
    num_tokens: int | None = None
    """Codes of each window, for a nested tokenizer; by default all N."""
    target_psnr: float | None = None
    """For a nested tokenizer: each window gets the fewest codes that give it back at this PSNR in dB, N at most. Neither
    bars nor what completes the last window count."""
    batch_size: int = 8
    """Windows at a time."""

    def __post_init__(self):
        if self.num_tokens is not None and self.target_psnr is not None:
            raise ValueError("give num_tokens or target_psnr, not both")
        _check_batch(self.batch_size)

    def check(self, tokenizer: LarpTokenizer) -> None:
        """ValueError unless the tokenizer can encode so."""
        if self.num_tokens is not None:
            tokenizer.check_length(self.num_tokens)
        if self.target_psnr is not None:
            tokenizer.check_length(1)
            if not self.target_psnr > 0:
                raise ValueError(f"target_psnr is in dB and positive, got {self.target_psnr}")


@dataclass(frozen=True)
class Report:
    """What became of a video that went through a tokenizer."""

    frames: int
    fps: float
    height: int
    """Of the output."""
    width: int
    windows: int
    codes: int
    bits: float
    """codes * log2(K)."""
    bits_per_pixel: float
    """bits over the pixels that the tokenizer saw of the video: frames * H * W, without the bars of `pad`."""
    tokens_per_second: float
    """Codes for each second of video."""
    psnr: float
    """In dB, from the squared error over these same pixels of all frames."""
    notes: tuple[str, ...]
    """What was lost on the way, such as sound that the container cannot hold."""


def tokenize_video(
    path: str | Path,
    tokenizer: LarpTokenizer,
    encoding: Encoding | None = None,
    *,
    name: str = "",
    variant: str | None = None,
) -> TokenizedVideo:
    """Encode a video file of any length and size; `.save("video.larp")` of the result writes a token file.

    `name` and `variant` say which tokenizer it was, for whoever reads the file. Raises VideoError for a file that
    cannot be read to its end, ValueError for what the tokenizer cannot do.
    """
    source, frames, codes = Source.open(path, tokenizer, encoding or Encoding()), 0, []
    for batch in source.batches("tokenizing"):
        frames += sum(batch.kept)
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
    name: str = "the tokenizer at hand",
    where: str | Path = "the tokenized video",
) -> Path:
    """Write the video that the codes stand for, in silence; returns its path.

    original_size: bars are cut off and the pictures scaled back to the size they had; by default they have the
    tokenizer's. `name` and `where` (the token file) are for the message of a TokenFileError, raised for another
    tokenizer than the codes were made with.
    """
    _check_batch(batch_size)
    video.check_tokenizer(tokenizer, name, where)
    header, left = video.header, video.header.frames
    with VideoWriter(out, header.fps) as writer, _progress(header.frames, "detokenizing") as bar:
        for windows in _batched(video.windows, batch_size):
            for clip in decode_windows(tokenizer, windows):
                kept = min(left, header.num_frames)
                _write(writer, clip_to_frames(clip[:, :kept]), header.fitting if original_size else None)
                left -= kept
                bar.update(kept)
    return Path(out)


def reconstruct_video(
    path: str | Path,
    out: str | Path,
    tokenizer: LarpTokenizer,
    encoding: Encoding | None = None,
    *,
    original_size: bool = False,
) -> Report:
    """Write a video file as the tokenizer gives it back, with its sound where `out` can hold it.

    original_size: as in `detokenize_video`. Raises ValueError if `out` is the video itself, and what `tokenize_video`
    raises; there is then no new file.
    """
    check_paths(path, out)
    source = Source.open(path, tokenizer, encoding or Encoding())
    fitting, tally = source.fitting, _Tally()
    notes = []
    if not source.info.even:
        notes.append(f"the frames come at uneven times: written at their average of {source.info.fps:.4g} a second")
    with AudioTrack(path) as audio, VideoWriter(out, source.info.fps, audio=audio) as writer:
        for batch in source.batches("reconstructing"):
            clips = decode_windows(tokenizer, batch.codes)
            for pixels, codes, clip, kept in zip(batch.pixels, batch.codes, clips, batch.kept, strict=True):
                tally.add(source, pixels_to_clip(pixels[:kept]), clip[:, :kept].cpu(), len(codes))
                _write(writer, clip_to_frames(clip[:, :kept]), fitting if original_size else None)
    return tally.report(source, fitting.kept if original_size else fitting.frame, (*notes, *audio.notes))


def check_paths(path: str | Path, out: str | Path) -> None:
    """VideoError unless `path` begins like a video; ValueError if `out` is this very file. For use before long work."""
    with opened(path):
        pass
    if Path(out).exists() and Path(out).samefile(path):
        raise ValueError(f"{out} is the video itself: give another name for the output")


@dataclass(frozen=True)
class Batch:
    """Windows on their way: `pixels` uint8 (B, T, H, W, 3), how many frames of each are real, and its codes (n,)."""

    pixels: np.ndarray
    kept: list[int]
    codes: list[Tensor]


@dataclass(frozen=True)
class Source:
    """A video file about to be encoded."""

    path: Path
    info: VideoInfo
    fitting: Fitting
    tokenizer: LarpTokenizer
    encoding: Encoding

    @classmethod
    def open(cls, path: str | Path, tokenizer: LarpTokenizer, encoding: Encoding) -> "Source":
        """Look at a file. Raises VideoError, or ValueError if size or tokenizer do not allow the encoding."""
        encoding.check(tokenizer)
        info = probe(path)
        try:
            fitting = Fitting(encoding.fit, (info.height, info.width), tokenizer.config.clip_shape[1:])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return cls(Path(path), info, fitting, tokenizer, encoding)

    def batches(self, what: str) -> Iterator[Batch]:
        """Encode window after window, with a progress bar that says `what`; VideoError where decoding fails."""
        length = self.tokenizer.config.num_frames
        with _progress(self.info.frames, what) as bar:
            fitted = (self.fitting.apply(frame[None])[0] for frame in iter_frames(self.path))
            for windows in _batched(cut_windows(fitted, length), self.encoding.batch_size):
                pixels, kept = np.stack([frames for frames, _ in windows]), [count for _, count in windows]
                yield Batch(pixels, kept, self._encode(pixels, kept))
                bar.update(sum(kept))

    def _encode(self, pixels: np.ndarray, kept: list[int]) -> list[Tensor]:
        clip = torch.stack([pixels_to_clip(frames) for frames in pixels]).to(self.tokenizer.codebook.device)
        codes = self.tokenizer.encode(clip, self.encoding.num_tokens)
        lengths = torch.full((len(codes),), codes.shape[1])
        if self.encoding.target_psnr is not None:
            region = self.fitting.region
            lengths = shortest_prefixes(self.tokenizer, clip, codes, self.encoding.target_psnr, region, kept)
        return [row[:length].cpu() for row, length in zip(codes, lengths.tolist(), strict=True)]

    def header(self, frames: int, name: str, variant: str | None) -> TokenHeader:
        """What a token file of this video says."""
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
    """Frames (H, W, 3) -> windows (length, H, W, 3), each with its number of real frames.

    The last window is completed by repeating the last frame.
    """
    for window in _batched(frames, length):
        yield np.stack(window + [window[-1]] * (length - len(window))), len(window)


def decode_windows(tokenizer: LarpTokenizer, windows: Sequence[Tensor]) -> Tensor:
    """Codes of B windows, (n,) each, n differing for nested tokenizers -> clips (B, 3, T, H, W) in [0, 1]."""
    return torch.cat([tokenizer.decode(torch.stack(list(alike))) for _, alike in groupby(windows, key=len)])


@torch.inference_mode()
def shortest_prefixes(
    tokenizer: LarpTokenizer,
    clips: Tensor,
    codes: Tensor,
    target_psnr: float,
    region: tuple[slice, slice],
    kept: Sequence[int],
) -> Tensor:
    """Return how many of its codes (B, N) each window (B, 3, T, H, W) needs for `target_psnr` dB: (B,) int64.

    As `LarpTokenizer.shortest_prefix`, but only the rows and columns of `region` and the first `kept` (B,) frames
    count. However the PSNR goes up and down with the codes, a length below N is one that was seen to reach the target.
    """
    latents, counts = tokenizer.quantizer.lookup(codes), torch.tensor(kept, device=codes.device)
    real = torch.arange(clips.shape[2], device=codes.device) < counts[:, None]

    def reached(lengths: Tensor) -> Tensor:
        again = tokenizer.decode_latents(tokenizer.mask(latents, lengths)).float().clamp(0, 1)
        errors = (clips[..., *region].float() - again[..., *region]).square().mean((1, 3, 4))
        error = torch.where(real, errors, 0).sum(1) / counts
        return -10 * error.clamp(min=1e-10).log10() >= target_psnr + _ROUNDING

    return shortest_lengths(reached, codes)


@dataclass
class _Tally:
    """Sums over a video."""

    error: float = 0.0
    values: int = 0
    frames: int = 0
    windows: int = 0
    codes: int = 0
    missed: int = 0
    """Windows under the target."""

    def add(self, source: Source, clip: Tensor, again: Tensor, codes: int) -> None:
        seen = (..., *source.fitting.region)
        error, values = (clip[seen].double() - again[seen].double()).square().sum().item(), clip[seen].numel()
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
    """In dB, of a sum of squared errors over so many values; 100 dB at most, as `larp.models.losses.psnr`."""
    return -10 * math.log10(max(error / values, 1e-10))


def _write(writer: VideoWriter, frames: np.ndarray, fitting: Fitting | None) -> None:
    if fitting is None:
        writer.write(frames)
    else:
        for frame in frames:  # one by one: the video may be much larger than the tokenizer's frame
            writer.write(fitting.undo(frame[None]))


def _batched(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def _progress(frames: int, what: str) -> tqdm:
    return tqdm(total=frames, desc=what, unit="frame", delay=1, leave=False)


def _check_batch(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
