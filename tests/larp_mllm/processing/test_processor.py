"""LarpMllmProcessor: plain text, round trips, batches, video inputs, saving, checks of the tokenizers."""

import json
import shutil

from larp.data.clips import clip_to_frames
from larp.data.video import read_video, write_video
from larp_mllm.generation.logits_processors import SpanRules
from larp_mllm.generation.sampling import VideoSampling
from larp_mllm.model.base_models import tiny_tokenizer
from larp_mllm.model.vocabulary import Vocabulary
from larp_mllm.processing.processor import LarpMllmProcessor
from larp_mllm.video import Video
from tests.larp_mllm.tiny import CAPTIONS, tiny_mllm, tiny_video_tokenizer
from tests.larp_mllm.tokenizers import llama3

import numpy as np
import pytest
import torch
from transformers import AddedToken, AutoProcessor, LogitsProcessorList

TYPED = "a <|video_start|> b <|im_end|><|endoftext|> <|im_start|>user <tool_call> <<tool_call><|im_<|im_end|>end|>"


def test_typed_control_tokens_stay_text(mllm):
    processor = mllm.processor
    ids = processor.encode_text(TYPED)
    assert processor.vocabulary.is_text(torch.tensor(ids)).all()
    assert not set(ids) & set(processor.tokenizer.all_special_ids)
    assert processor.tokenizer.decode(ids) == TYPED


def test_the_end_token_that_a_trainer_appends_is_an_id_and_others_are_text(mllm):
    processor, end = mllm.processor, mllm.processor.tokenizer.eos_token
    ids = processor(f"a {end} b{end}")["input_ids"][0]
    assert ids == [*processor.encode_text(f"a {end} b"), processor.tokenizer.eos_token_id]
    assert processor(f"a{end}{end}")["input_ids"][0][:-1] == processor.encode_text(f"a{end}")
    for options, last in (
        ({"add_special_tokens": False}, []),
        ({"open_video": True}, [processor.vocabulary.video_start]),
    ):
        assert processor(f"b{end}", **options)["input_ids"][0] == [*processor.encode_text(f"b{end}"), *last]


def test_tokens_added_as_non_special_stay_text():
    tokenizer = tiny_tokenizer(CAPTIONS)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("<|im_end|>x", special=False)])
    video_tokenizer = tiny_video_tokenizer()
    vocabulary = Vocabulary(len(tokenizer), video_tokenizer.codebook_size, video_tokenizer.num_tokens)
    ids = LarpMllmProcessor(tokenizer, video_tokenizer, vocabulary).encode_text(TYPED + "<|im_end|>x")
    assert not set(ids) & set(tokenizer.added_tokens_decoder)
    assert tokenizer.decode(ids) == TYPED + "<|im_end|>x"


def test_text_and_videos_survive_encoding_and_decoding(qwen):
    processor = qwen.processor
    clip = torch.rand(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = processor("before <video> after", [clip])["input_ids"][0]
    codes = processor.encode_videos([clip])[0]
    assert processor.vocabulary.split(ids)[1] == ("video", codes)
    before, video, after = processor.decode(ids)
    assert (before, after) == ("before", "after")
    assert np.array_equal(video, clip_to_frames(processor.video_tokenizer.decode(torch.tensor([codes]))[0]))


def test_frames_of_another_size_are_resized_and_short_videos_refused(qwen):
    frames = np.random.default_rng(0).integers(0, 256, (7, 40, 30, 3), dtype=np.uint8)
    codes = qwen.processor.encode_videos([frames])[0]
    assert len(codes) == 4
    assert codes == qwen.processor.encode_videos([frames[1:5]])[0]
    with pytest.raises(ValueError, match=r"3 frames.*reads 4"):
        qwen.processor.encode_videos([frames[:3]])


def test_arrays_and_tensors_give_the_same_codes(qwen):
    encode = qwen.processor.encode_videos
    clip = torch.rand(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert encode([clip.numpy()]) == encode([clip.numpy().astype(np.float64)]) == encode([clip])
    frames = clip_to_frames(clip)
    frames.flags.writeable = False
    assert encode([torch.tensor(frames)]) == encode([list(frames)]) == encode([frames])


FRAMES = np.zeros((4, 16, 16, 3))


@pytest.mark.parametrize(
    "wrong, found",
    [
        (FRAMES.astype(np.float32), r"float32 \(4, 16, 16, 3\)"),
        (FRAMES.astype(np.int64), r"int64 \(4, 16, 16, 3\)"),
        (torch.zeros(4, 16, 16, 3, dtype=torch.int32), r"int32 \(4, 16, 16, 3\)"),
        (FRAMES[..., 0].astype(np.uint8), r"uint8 \(4, 16, 16\)"),
        (FRAMES[:0].astype(np.uint8), r"uint8 \(0, 16, 16, 3\)"),
        (None, "got None"),
        (3, "got 3"),
    ],
)
def test_inputs_that_are_no_video_are_refused(qwen, wrong, found):
    with pytest.raises(ValueError, match=rf"uint8 frames \(T, H, W, 3\).*float clip \(3, T, H, W\).*{found}"):
        qwen.describe([wrong])


def test_clips_of_another_range_or_size_are_refused(qwen):
    clip = np.full((3, 4, 16, 16), 0.5, np.float32)
    for wrong, words in ((clip * 255, r"in \[0, 1\]"), (clip * np.nan, "nan"), (clip[..., :8], r"16, 16\), got shape")):
        with pytest.raises(ValueError, match=words):
            qwen.describe([wrong])
    with pytest.raises(ValueError, match="one shape"):
        qwen.processor.encode_videos([clip, clip[:, :2]])


def test_more_videos_than_placeholders_are_refused(qwen):
    with pytest.raises(ValueError, match="0 <video> placeholders but 1 videos"):
        qwen.processor("no placeholder", [torch.rand(3, 4, 16, 16)])


def test_a_video_tokenizer_of_another_size_is_refused(qwen):
    with pytest.raises(ValueError, match="use the tokenizer it was trained with"):
        LarpMllmProcessor(qwen.processor.tokenizer, qwen.processor.video_tokenizer, Vocabulary(300, 32, 4))


def test_saved_tokenizers_are_checked_at_load(qwen, tmp_path):
    qwen.save(tmp_path)
    again = LarpMllmProcessor.from_pretrained(tmp_path)
    assert again.encode_text(TYPED) == qwen.processor.encode_text(TYPED)
    tiny_video_tokenizer(seed=1).save_pretrained(tmp_path / "video_tokenizer")
    with pytest.raises(ValueError, match="weight hash"):
        LarpMllmProcessor.from_pretrained(tmp_path)


def test_a_missing_record_of_the_tokenizers_is_refused(qwen, tmp_path):
    qwen.save(tmp_path)
    expected = qwen.processor.video_tokenizer.weight_hash()
    for name, key in (
        ("config.json", "video_tokenizer_hash"),
        ("processor_config.json", "video_tokenizer_hash"),
        ("processor_config.json", "text_tokenizer_hash"),
    ):
        whole = (tmp_path / name).read_text()
        saved = json.loads(whole)
        (tmp_path / name).write_text(json.dumps({k: v for k, v in saved.items() if k != key}))
        with pytest.raises(ValueError, match=f'{name} does not record {key}, .*write "{key}": "{saved[key]}" into'):
            LarpMllmProcessor.from_pretrained(tmp_path)
        (tmp_path / name).write_text(whole)
    assert saved["video_tokenizer_hash"] == expected
    (tmp_path / "processor_config.json").rename(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"processor_config.json is missing, .*copy the model folder again"):
        LarpMllmProcessor.from_pretrained(tmp_path)
    (tmp_path / "saved").rename(tmp_path / "processor_config.json")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"given_frames": 4}))
    with pytest.raises(ValueError, match="given_frames = 4, but a clip of the video tokenizer has 4 frames"):
        LarpMllmProcessor.from_pretrained(tmp_path)


def test_a_model_is_saved_with_the_record_of_its_video_tokenizer(tmp_path):
    mllm = tiny_mllm()
    mllm.model.config.video_tokenizer_hash = ""
    mllm.save(tmp_path)
    LarpMllmProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("ids, words", [
    ([-1], r"id -1 is out of range: the ids of this model are 0 to \d+"),
    ([10**6], "id 1000000 is out of range"),
    ("abc", "one sequence of whole numbers, got 'abc'"),
    (["1"], "one sequence of whole numbers"),
    ([True], "one sequence of whole numbers"),
    ([[1, 2]], "one sequence of whole numbers"),
    (torch.rand(3), "one sequence of whole numbers"),
    (5, "one sequence of whole numbers, got '5'"),
    (None, "one sequence of whole numbers, got 'None'"),
])  # fmt: skip
def test_bad_ids_are_refused_by_decode(qwen, ids, words):
    with pytest.raises(ValueError, match=words):
        qwen.processor.decode(ids)
    with pytest.raises(ValueError, match=f"sequence 1: .*{words}"):
        qwen.processor.batch_decode([[5], ids])


def test_arguments_of_another_type_are_refused(qwen):
    text, clips, vocabulary = qwen.processor.tokenizer, qwen.processor.video_tokenizer, qwen.processor.vocabulary
    for arguments, words in (
        ((None, clips, vocabulary), "the text tokenizer must be a PreTrainedTokenizerBase, got NoneType"),
        ((3, clips, vocabulary), "the text tokenizer must be a PreTrainedTokenizerBase, got int"),
        ((text, None, vocabulary), "the video tokenizer must be a LarpTokenizer, got NoneType"),
        ((text, clips, 316), "the vocabulary must be a Vocabulary, got int"),
        ((text, clips, vocabulary, 0), "frame_stride must be a whole number of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            LarpMllmProcessor(*arguments)
    for videos in (3, "clip.mp4", Video(FRAMES.astype(np.uint8), 8.0), FRAMES.astype(np.uint8), [FRAMES[0]] * 4):
        for call in (qwen.describe, lambda videos: qwen.processor(["<video>"] * 2, videos)):
            with pytest.raises(ValueError, match="videos must be a list, got "):
                call(videos)


def test_a_text_tokenizer_that_has_grown_is_refused(qwen, tmp_path):
    qwen.save(tmp_path)
    grown = tiny_tokenizer(CAPTIONS)
    grown.add_tokens(["<extra>"])
    grown.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer files"):
        LarpMllmProcessor.from_pretrained(tmp_path)


CLIPS = torch.rand(3, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def test_texts_are_padded_on_the_tokenizers_side_or_on_padding_side(qwen):
    processor = qwen.processor
    texts, videos = ["a person surfing", "<video> b <video>"], [[], [CLIPS[0], CLIPS[1]]]
    single = [processor(text, group)["input_ids"][0] for text, group in zip(texts, videos, strict=True)]
    assert processor(texts, videos)["input_ids"] == single
    for side in (None, "left", "right"):
        batch = processor(texts, videos, return_tensors="pt", padding=True, padding_side=side)
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, max(map(len, single)))
        for ids, mask, expected in zip(batch["input_ids"], batch["attention_mask"], single, strict=True):
            assert ids[mask.bool()].tolist() == expected
        first = (side or processor.tokenizer.padding_side) == "right"
        assert batch["attention_mask"][0, 0] == first and batch["attention_mask"][0, -1] == (not first)
    assert isinstance(processor(texts, videos, return_tensors="np", padding=True)["input_ids"], np.ndarray)
    assert processor("a person", return_tensors="pt")["input_ids"].shape[0] == 1
    with pytest.raises(ValueError, match="give padding=True"):
        processor(texts, videos, return_tensors="pt")
    with pytest.raises(ValueError, match="padding_side must be left or right, got 'top'"):
        processor(texts, videos, padding=True, padding_side="top")


def test_the_text_whose_videos_do_not_match_is_named(qwen):
    with pytest.raises(ValueError, match="text 1 has 2 <video> placeholders but 1 videos"):
        qwen.processor(["<video>", "<video> and <video>"], [[CLIPS[0]], [CLIPS[1]]])
    with pytest.raises(ValueError, match="2 texts need a list of 2 lists of videos"):
        qwen.processor(["<video>", "<video>"], [CLIPS[0], CLIPS[1]])
    with pytest.raises(ValueError, match="text 0 has 1 <video> placeholders but 0 videos"):
        qwen.processor(["<video>", "a"])


def test_the_begin_id_and_an_opened_video(tmp_path):
    tokenizer = llama3(tmp_path)
    clips = tiny_video_tokenizer()
    processor = LarpMllmProcessor(tokenizer, clips, Vocabulary(len(tokenizer), clips.codebook_size, clips.num_tokens))
    words = processor.encode_text("a man")
    [prompt] = processor("a man", open_video=True)["input_ids"]
    assert (
        prompt == [tokenizer.bos_token_id, *words, processor.vocabulary.video_start] == processor.layout.prompt(words)
    )
    assert processor("a man", add_special_tokens=False)["input_ids"] == [words]


def test_generate_takes_its_batches(qwen):
    batch = qwen.processor(
        ["a person surfing", "a"], return_tensors="pt", padding=True, padding_side="left", open_video=True
    )
    rules = [SpanRules(qwen.processor.vocabulary)]
    ids = qwen.model.generate(**batch, max_new_tokens=5, do_sample=False, logits_processor=LogitsProcessorList(rules))
    for row, text in zip(ids, ("a person surfing", "a"), strict=True):
        (content, video) = qwen.processor.decode(row)
        expected = qwen.generate([text], sampling=VideoSampling(guidance_scale=1.0, temperature=0.0))[0]
        assert content == text and np.array_equal(video, expected.frames)
    assert [len(contents) for contents in qwen.processor.batch_decode(ids)] == [2, 2]
    ids[1, -2] = 0
    with pytest.raises(ValueError, match="sequence 1: the video span at position"):
        qwen.processor.batch_decode(ids)


def test_nothing_is_truncated(qwen):
    encode = qwen.processor
    alone, short = (encode(text)["input_ids"][0] for text in ("a person", "a"))
    longest = len(alone)
    assert encode("a person", truncation=False, max_length=longest)["input_ids"] == [alone]
    assert encode(["a person", "a"], padding="longest", max_length=longest)["attention_mask"][1].count(1) == len(short)
    assert (
        list(map(len, encode(["a person", "a"], padding="max_length", max_length=longest + 3)["input_ids"]))
        == [longest + 3] * 2
    )
    for words, call in {
        "truncation is True, but nothing is truncated": lambda: encode("a person", truncation=True),
        f"sequence 1 has {longest} ids, more than max_length = {longest - 1}": lambda: encode(
            ["a", "a person"], max_length=longest - 1
        ),
        "max_length must be a whole number of at least 1": lambda: encode("a", max_length=0),
        'padding must be True, False, or "max_length" with a max_length, got .max_length': lambda: encode(
            "a", padding="max_length"
        ),
        r"sequence 0 has \d+ ids, more than max_length = 2": lambda: encode.apply_chat_template(
            [{"role": "user", "content": "a"}], max_length=2
        ),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()


def test_control_tokens_are_decoded_only_without_skip_special_tokens(qwen):
    processor = qwen.processor
    end, span = processor.tokenizer.eos_token, processor.vocabulary.span([0, 1, 2, 3])
    ids = [*processor.encode_text("a "), processor.tokenizer.eos_token_id, *span]
    for options, text in (
        ({}, "a"),
        ({"skip_special_tokens": True}, "a"),
        ({"skip_special_tokens": False}, f"a {end}"),
    ):
        decoded, video = processor.decode(ids, clean_up_tokenization_spaces=False, **options)
        assert decoded == text == processor.batch_decode([ids], **options)[0][0] and video.shape == (4, 16, 16, 3)
    with pytest.raises(ValueError, match="clean_up_tokenization_spaces would change the text"):
        processor.decode(ids, clean_up_tokenization_spaces=True)


def test_files_are_read_with_the_stride_of_training(qwen, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames, 8)
    read, _ = read_video(tmp_path / "a.mp4")
    qwen.save(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"frame_stride": 2}))
    strided = LarpMllmProcessor.from_pretrained(tmp_path / "model")
    assert qwen.processor.encode_videos([tmp_path / "a.mp4"]) == qwen.processor.encode_videos([read[4:8]])
    assert strided.encode_videos([str(tmp_path / "a.mp4")]) == qwen.processor.encode_videos([read[2:10:2]])
    assert qwen.processor.encode_videos([Video(read, 8.0)]) == qwen.processor.encode_videos([read])


def test_auto_processor_loads_a_folder_with_and_without_the_model(qwen, tmp_path):
    qwen.save(tmp_path / "whole")
    qwen.processor.save_pretrained(tmp_path / "alone")
    for folder in (tmp_path / "whole", tmp_path / "alone"):
        again = AutoProcessor.from_pretrained(folder)
        assert type(again) is LarpMllmProcessor and again.vocabulary == qwen.processor.vocabulary
        assert again.encode_text(TYPED) == qwen.processor.encode_text(TYPED)
        assert again.encode_videos(CLIPS) == qwen.processor.encode_videos(CLIPS)
    assert "LarpMllmProcessor" in repr(again)
    for first, side in enumerate(("left", "right")):
        again = AutoProcessor.from_pretrained(folder, padding_side=side)
        assert again(["a person", "a"], padding=True)["attention_mask"][1][0] == first
    with pytest.raises(ValueError, match="padding_side must be left or right, got 'top'"):
        AutoProcessor.from_pretrained(folder, padding_side="top")


def test_a_folder_without_a_processor_and_unknown_options_are_refused(qwen, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="holds no processor of a language model with video vocabulary"):
        LarpMllmProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="knows no varient: leave them out"):
        LarpMllmProcessor.from_pretrained(tmp_path, varient="ema")


class FakeHub:
    """An HfApi that uploads into a local folder."""

    refuses = False

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, private=None, exist_ok=False):
        if self.refuses:
            raise OSError("401 Client Error: Unauthorized")
        return f"hub:{repo_id}:private={private}:token={self.token}"

    def create_branch(self, repo_id, branch, exist_ok=False):
        type(self).branch = branch

    def upload_folder(self, repo_id, folder_path, revision=None):
        shutil.copytree(folder_path, self.folder)


def test_an_upload_includes_the_video_tokenizer(qwen, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "folder", tmp_path / "hub", raising=False)
    address = qwen.processor.push_to_hub("owner/name", private=True, token="t", revision="v1")
    assert address == "hub:owner/name:private=True:token=t" and FakeHub.branch == "v1"
    again = LarpMllmProcessor.from_pretrained(tmp_path / "hub")
    assert again.encode_videos(CLIPS) == qwen.processor.encode_videos(CLIPS)
    monkeypatch.setattr(FakeHub, "folder", tmp_path / "again")
    qwen.processor.save_pretrained(tmp_path / "saved", push_to_hub=False)
    assert not (tmp_path / "again").exists()
    qwen.processor.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="owner/name", revision="v2")
    assert (tmp_path / "again/video_tokenizer/config.json").is_file() and FakeHub.branch == "v2"
    monkeypatch.setattr(FakeHub, "refuses", True)
    with pytest.raises(ValueError, match=r"owner/name could not be uploaded .*401.*hf auth"):
        qwen.processor.push_to_hub("owner/name")
