"""What counts as a video: arrays of either layout, lists of frames, readers of other packages, one video for one text."""

from types import SimpleNamespace

from larp.data.video import ShortVideoError, VideoError
from larp_mllm.processing.video_inputs import read_frames, read_whole_video, to_pixels
from larp_mllm.video import Video

import av
import numpy as np
import pytest
import torch
from PIL import Image

FRAMES = np.random.default_rng(0).integers(0, 256, (6, 16, 20, 3), dtype=np.uint8)
CHANNELS_FIRST = FRAMES.transpose(0, 3, 1, 2)


class FrameBatch:
    """torchcodec's FrameBatch, and its Frame: tensors, of which `data` are the pixels."""

    def __init__(self, data: torch.Tensor):
        self.data, self.pts_seconds = data, torch.arange(len(data)) / 8

    def __len__(self):
        return len(self.data)

    def __getitem__(self, key):
        return FrameBatch(self.data[key])

    def __iter__(self):
        return iter((self.data, self.pts_seconds))


class VideoDecoder:
    """torchcodec's VideoDecoder."""

    metadata = SimpleNamespace(average_fps=12.0)

    def __init__(self, frames: np.ndarray):
        self.frames, self.asked = torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2))), []

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, key):
        self.asked.append(key)
        return self.frames[key]


class BatchDecoder(VideoDecoder):
    """The same with its method for several frames."""

    def get_frames_at(self, indices):
        self.asked += indices
        return FrameBatch(self.frames[indices])


class NDArray:
    """decord's array."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def asnumpy(self) -> np.ndarray:
        return self.array


class VideoReader:
    """decord's VideoReader."""

    def __init__(self, frames: np.ndarray):
        self.frames, self.asked = frames, []

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, index):
        return NDArray(self.frames[index])

    def get_batch(self, indices):
        self.asked += indices
        return NDArray(self.frames[indices])

    def get_avg_fps(self) -> float:
        return 12.0


INPUTS = {
    "array": FRAMES,
    "tensor": torch.from_numpy(FRAMES),
    "tensor with a gradient's history": torch.from_numpy(FRAMES).requires_grad_(False),
    "channels first": CHANNELS_FIRST,
    "tensor, channels first": torch.from_numpy(CHANNELS_FIRST),
    "images": [Image.fromarray(frame) for frame in FRAMES],
    "images of a tuple, with an alpha channel": tuple(Image.fromarray(frame).convert("RGBA") for frame in FRAMES),
    "list of arrays": list(FRAMES),
    "list of tensors, channels first": list(torch.from_numpy(CHANNELS_FIRST)),
    "a Video": Video(FRAMES, 8.0),
    "a Video backwards twice": Video(FRAMES[::-1], 8.0)[::-1],
    "FrameBatch": FrameBatch(torch.from_numpy(CHANNELS_FIRST)),
    "FrameBatch, channels last": FrameBatch(torch.from_numpy(FRAMES)),
    "list of Frames": [FrameBatch(frame) for frame in torch.from_numpy(CHANNELS_FIRST)],
    "decord's batch": NDArray(FRAMES),
    "list of decord's frames": [NDArray(frame) for frame in FRAMES],
    "PyAV's frames": [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in FRAMES],
}
READERS = [VideoDecoder, BatchDecoder, VideoReader]


@pytest.mark.parametrize("name", INPUTS)
def test_frames_of_any_kind_are_the_same_video(qwen, name):
    pixels = to_pixels(INPUTS[name])
    assert pixels.dtype == torch.uint8 and np.array_equal(pixels.numpy(), FRAMES)
    processor = qwen.processor
    expected = processor("<video>", [FRAMES])["input_ids"]
    assert processor("<video>", [INPUTS[name]])["input_ids"] == expected
    assert processor("<video>", INPUTS[name])["input_ids"] == expected
    assert processor(["<video>"], INPUTS[name])["input_ids"] == expected
    assert processor(["<video>", "a"], [[INPUTS[name]], []])["input_ids"][:1] == expected
    whole, fps = read_whole_video(INPUTS[name], 16, 20, 2, 5.0)
    assert np.array_equal(whole, FRAMES) and fps == (8.0 if "Video" in name else 5.0)


def test_an_iterator_of_frames_is_a_video_and_one_of_videos_is_a_list(qwen):
    expected = qwen.processor("<video>", [FRAMES])["input_ids"]
    for frames in (list(FRAMES), INPUTS["images"], INPUTS["PyAV's frames"]):
        assert np.array_equal(to_pixels(iter(frames)).numpy(), FRAMES)
        for videos in (iter(frames), [iter(frames)], iter([frames]), (map(np.copy, FRAMES) for _ in range(1))):
            assert qwen.processor("<video>", videos)["input_ids"] == expected
    assert qwen.processor(["<video>", "a"], [[iter(FRAMES)], []])["input_ids"][:1] == expected
    assert np.array_equal(read_whole_video(iter(FRAMES), 16, 20, 2, 5.0)[0], FRAMES)
    with pytest.raises(ValueError, match="uint8 frames"):
        to_pixels(iter(()))


@pytest.mark.parametrize("layout", ["channels last", "channels first"])
def test_three_frames_are_no_channels(layout):
    """Neither is the axis of frames, nor a height of 3 pixels by itself."""
    frames = FRAMES[:3] if layout == "channels last" else CHANNELS_FIRST[:3]
    assert np.array_equal(to_pixels(frames).numpy(), FRAMES[:3])
    assert np.array_equal(to_pixels(FRAMES[:, :, :3].transpose(0, 3, 1, 2)[:, :, :, :2]).numpy(), FRAMES[:, :, :2])


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, list])
def test_frames_of_which_two_axes_have_size_3_are_refused(qwen, kind):
    frames = FRAMES[:, :3]
    with pytest.raises(ValueError, match=r"may be \(T, H, W, 3\) or \(T, 3, H, W\).*larp_mllm\.Video\(frames, fps\)"):
        qwen.processor("<video>", kind(frames))
    assert np.array_equal(to_pixels(Video(frames, 8.0)).numpy(), frames)
    assert np.array_equal(to_pixels([Image.fromarray(frame) for frame in frames]).numpy(), frames)


@pytest.mark.parametrize(
    "wrong",
    [
        FRAMES.transpose(3, 0, 1, 2),
        FRAMES[..., :1],
        [FRAMES[0], FRAMES[1, :8]],
        [Image.new("RGB", (20, 16)), Image.new("RGB", (16, 20))],
        FrameBatch(torch.from_numpy(CHANNELS_FIRST[None])),
        [],
    ],
)
def test_other_layouts_are_named(wrong):
    with pytest.raises(ValueError, match=r"uint8 frames \(T, H, W, 3\) or \(T, 3, H, W\).*got .*\(.*convert it"):
        to_pixels(wrong)


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_is_read_like_a_file(qwen, reader):
    """Of a long one the middle frames alone, with the stride of training."""
    frames = np.random.default_rng(1).integers(0, 256, (40, 16, 20, 3), dtype=np.uint8)
    made = reader(frames)
    assert np.array_equal(read_frames(made, 4, 3).numpy(), frames[15:25:3])
    assert made.asked == [15, 18, 21, 24]
    assert qwen.processor("<video>", made)["input_ids"] == qwen.processor("<video>", frames)["input_ids"]
    whole, fps = read_whole_video(reader(frames), 16, 20, 3, 5.0)
    assert np.array_equal(whole, frames[0::3]) and fps == 4.0
    with pytest.raises(ShortVideoError, match=rf"{reader.__name__}: has 9 frames, the model reads 4 at stride 3"):
        read_frames(reader(frames[:9]), 4, 3)


def test_an_error_of_a_reader_is_an_error_of_the_video():
    class Broken(VideoReader):
        def get_batch(self, indices):
            raise RuntimeError("Failed to seek")

    with pytest.raises(VideoError, match="the Broken gives no frames 1 to 4: Failed to seek"):
        read_frames(Broken(FRAMES), 4, 1)
    with pytest.raises(VideoError, match="the VideoReader holds no video frame"):
        read_whole_video(VideoReader(FRAMES[:0]), 16, 20, 1, 8.0)


def test_a_video_describes_and_continues_from_what_a_reader_gives(qwen):
    reader = VideoDecoder(np.tile(FRAMES, (2, 1, 1, 1)))
    assert qwen.describe([reader]) == qwen.describe([np.tile(FRAMES, (2, 1, 1, 1))])
