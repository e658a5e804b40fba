"""reconstruct, tokenize, detokenize: whole videos on the command line."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import larp.codec.whole_video
import larp_mllm.locate
from larp.codec.token_file import TokenizedVideo
from larp.codec.whole_video import Encoding
from larp.data.video import probe, read_video, write_video
from larp.models.tokenizer import LarpTokenizer
from larp_mllm.cli import main
from tests.larp.codec.test_whole_video import noise, random_tokenizer
from tests.larp.data.odd_videos import write_unevenly, write_with_sound
from tests.larp.models.test_tokenizer import tiny
from tests.larp_mllm.cli.test_cli import refused

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tokenizer, t, a video of ten frames, clip.mp4, and clip.larp, its codes."""
    made, tokenizer = tmp_path_factory.mktemp("made"), random_tokenizer(nested=True)
    tokenizer.save_pretrained(made / "t")
    write_video(made / "clip.mp4", noise(10), 12.5)
    larp.codec.whole_video.tokenize_video(made / "clip.mp4", tokenizer, Encoding(), name="t").save(made / "clip.larp")
    return made


@pytest.fixture
def folder(made, tmp_path, monkeypatch) -> Path:
    """A working folder with t and clip.mp4."""
    shutil.copytree(made, tmp_path, ignore=shutil.ignore_patterns("clip.larp"), dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tokenized(made, folder) -> Path:
    """The same folder, and clip.larp in it."""
    shutil.copy(made / "clip.larp", folder)
    return folder


def test_reconstruct_prints_its_figures(folder, capsys):
    main(["reconstruct", "clip.mp4", "-o", "new/out.mp4", "--tokenizer", "t", "--device", "cpu"])
    first, second = capsys.readouterr().out.splitlines()
    assert first == "new/out.mp4: 24x16 at 12.5 fps, 10 frames"
    assert re.fullmatch(
        r"PSNR [\d.]+ dB, 0.0234 bits per pixel, 22.5 codes per second of video \(3 x 4 frames, 18 codes of 32\)",
        second,
    )
    assert probe("new/out.mp4").frames == 10


def test_tokenize_then_detokenize_is_reconstruct(folder, capsys):
    main(["tokenize", "clip.mp4", "-o", "clip.larp", "--tokenizer", "t"])
    size = Path("clip.larp").stat().st_size
    assert capsys.readouterr().out == f"clip.larp: {size} bytes, 18 codes of 32 (3 x 4 frames)\n"
    main(["detokenize", "clip.larp", "-o", "a.mp4", "--tokenizer", "t"])
    assert capsys.readouterr().out == "a.mp4\n"
    main(["reconstruct", "clip.mp4", "-o", "b.mp4", "--tokenizer", "t"])
    assert (read_video("a.mp4")[0] == read_video("b.mp4")[0]).all()
    first = Path("clip.larp").read_bytes()
    main(["tokenize", "clip.mp4", "-o", "clip.larp", "--tokenizer", "t"])
    assert Path("clip.larp").read_bytes() == first and len(list(folder.iterdir())) == 5


def test_options_reach_the_tokenizer(folder, capsys):
    main(["tokenize", "clip.mp4", "-o", "a.larp", "--tokenizer", "t", "--num-tokens", "2", "--fit", "pad"])
    video = TokenizedVideo.load("a.larp")
    assert len(video.codes) == 6 and video.header.fit == "pad" and video.header.tokenizer == "t"
    main(["tokenize", "clip.mp4", "-o", "a.larp", "--tokenizer", "t", "--target-psnr", "1"])
    assert len(TokenizedVideo.load("a.larp").codes) == 3 and "note" not in capsys.readouterr().out
    main(["tokenize", "clip.mp4", "-o", "b.larp", "--tokenizer", "t", "--target-psnr", "60"])
    output = capsys.readouterr().out
    assert "note: 3 of 3 windows took all their codes and may be below the target of 60 dB" in output
    main(["detokenize", "a.larp", "-o", "a.mp4", "--tokenizer", "t", "--original-size", "--batch-size", "1"])
    assert (probe("a.mp4").height, probe("a.mp4").width) == (20, 30)
    main(["reconstruct", "clip.mp4", "-o", "a.mp4", "--tokenizer", "t", "--original-size", "--fit", "stretch"])
    assert (probe("a.mp4").height, probe("a.mp4").width) == (20, 50)


def test_losses_are_noted(folder, capsys):
    write_with_sound(Path("loud.mp4"), noise(30, 16, 16), 10)
    main(["reconstruct", "loud.mp4", "-o", "a.gif", "--tokenizer", "t"])
    assert "note: the sound was left out: a .gif holds none\n" in capsys.readouterr().out
    main(["reconstruct", "loud.mp4", "-o", "a.mp4", "--tokenizer", "t"])
    assert "note" not in capsys.readouterr().out


def test_frames_at_uneven_times_stay_there_or_become_even_with_a_note(folder, capsys):
    write_unevenly(Path("uneven.mp4"), noise(12, 32, 48))
    before = probe("uneven.mp4")
    for name, noted in (("a.mp4", False), ("a.avi", True)):
        main(["reconstruct", "uneven.mp4", "-o", name, "--tokenizer", "t"])
        note = "note: the frames come at uneven times: written at their average of "
        assert (note in capsys.readouterr().out) == noted
        after = probe(name)
        assert after.frames == 12 and after.even == noted
        assert after.duration_s == pytest.approx(before.duration_s, abs=1 / before.fps)
    assert probe("a.mp4").times.seconds == pytest.approx(before.times.seconds, abs=0.001)


def test_a_tokenizer_is_loaded_from_a_run_or_a_language_model(folder, qwen, capsys):
    run = folder / "run"
    LarpTokenizer.from_pretrained("t").save_pretrained(run / "model")
    (run / "config.json").write_text('{"data": "shapes:"}')
    main(["reconstruct", "clip.mp4", "-o", "a.mp4", "--tokenizer", str(run)])
    qwen.save(folder / "mllm" / "model")
    for chosen in ("mllm", "mllm/model"):
        main(["tokenize", "clip.mp4", "-o", "a.larp", "--tokenizer", chosen])
        assert TokenizedVideo.load("a.larp").header.weight_hash == qwen.processor.video_tokenizer.weight_hash()


def test_the_default_tokenizer_is_that_of_the_default_language_model(folder, qwen, capsys, monkeypatch):
    qwen.save(folder / "model")
    monkeypatch.setenv("LARP_MLLM_MODEL", str(folder / "model"))
    main(["tokenize", "clip.mp4", "-o", "a.larp"])
    assert TokenizedVideo.load("a.larp").header.weight_hash == qwen.processor.video_tokenizer.weight_hash()
    main(["detokenize", "a.larp", "-o", "a.mp4"])


def test_without_any_model_the_tokenizer_is_the_one_that_comes_along(folder, capsys, monkeypatch):
    main(["tokenize", "clip.mp4", "-o", "a.larp"])
    out, errors = capsys.readouterr()
    assert out.endswith("256 codes of 8192 (1 x 16 frames)\n")
    assert errors.startswith("the tokenizer is the one that comes with larp-mllm: 16 frames of 64x64 become 256 codes")
    main(["detokenize", "a.larp", "-o", "a.mp4"])
    assert probe("a.mp4").frames == 10
    # So too where the newest model was deleted.
    larp_mllm.locate.set_default_model(folder / "deleted")
    main(["detokenize", "a.larp", "-o", "b.mp4"])
    capsys.readouterr()
    monkeypatch.setattr(larp_mllm.locate, "_SHIPPED", folder / "broken")
    output = refused(capsys, "tokenize", "clip.mp4", "-o", "b.larp")
    assert "config.json, which comes with larp-mllm, is missing: install the package again" in output


def test_the_averaged_weights_are_another_tokenizer(folder, capsys):
    averaged = LarpTokenizer(tiny(nested=True)).save_pretrained(folder / "averaged")
    (averaged / "model.safetensors").rename(folder / "t" / "model.ema.safetensors")
    main(["tokenize", "clip.mp4", "-o", "a.larp", "--tokenizer", "t", "--variant", "ema"])
    assert "t, variant ema (hash" in refused(capsys, "detokenize", "a.larp", "-o", "a.mp4", "--tokenizer", "t")
    main(["detokenize", "a.larp", "-o", "a.mp4", "--tokenizer", "t", "--variant", "ema"])


def test_another_tokenizer_is_refused_with_both_names_and_hashes(folder, capsys):
    LarpTokenizer(tiny()).save_pretrained(folder / "other")
    main(["tokenize", "clip.mp4", "-o", "a.larp", "--tokenizer", "t"])
    output = refused(capsys, "detokenize", "a.larp", "-o", "a.mp4", "--tokenizer", "other")
    hashes = [LarpTokenizer.from_pretrained(name).weight_hash()[:12] for name in ("t", "other")]
    assert f"the tokenizer t (hash {hashes[0]})" in output and f"other is another (hash {hashes[1]})" in output
    assert not Path("a.mp4").exists()


@pytest.mark.parametrize(
    "command, source, out, words",
    [
        ("reconstruct", "clip.mp4", "x.webm", "suffix '.webm'; choose one of .mp4"),
        ("reconstruct", "clip.mp4", "x.webm", ".3gp, .gif\n"),
        ("detokenize", "clip.larp", "x.webm", ".3gp, .gif\n"),
        ("reconstruct", "clip.mp4", "x.png", "a .png holds no video; choose one of .mp4"),
        ("reconstruct", "", "x.mp4", "larp-mllm: no video was named"),
        ("reconstruct", "t", "x.mp4", "larp-mllm: t: is a folder"),
        ("tokenize", "", "x.larp", "larp-mllm: no video was named"),
        ("tokenize", "http://example.com/a.mp4", "x.larp", "http://example.com/a.mp4: URLs are not opened"),
        ("reconstruct", "clip.mp4", "clip.mp4", "clip.mp4 is the video itself"),
        ("reconstruct", "clip.mp4", "/proc/x.mp4", "/proc takes no files"),
        ("reconstruct", "clip.mp4", "http://x/y.mp4", "http://x/y.mp4: URLs are not written to"),
        ("reconstruct", "clip.mp4", "t", "suffix ''"),
        ("reconstruct", "none.mp4", "x.mp4", "none.mp4: no such file"),
        ("reconstruct", "text.mp4", "x.mp4", "text.mp4: does not begin like a video file"),
        ("tokenize", "clip.mp4", "x.mp4", "x.mp4: the name of a token file ends in .larp, such as x.larp"),
        ("tokenize", "clip.mp4", "/proc/x.larp", "/proc takes no files"),
        ("tokenize", "none.mp4", "x.larp", "none.mp4: no such file"),
        ("detokenize", "none.larp", "x.mp4", "none.larp: no such file"),
        ("detokenize", "text.mp4", "x.mp4", "text.mp4 is not a token file of larp-mllm tokenize"),
        ("detokenize", "clip.mp4", "x.mp4", "clip.mp4 is not a token file of larp-mllm tokenize"),
        ("detokenize", "clip.larp", "x.larp", "suffix '.larp'"),
    ],
)
def test_bad_files_are_refused_before_a_tokenizer_is_loaded(
    tokenized, monkeypatch, capsys, command, source, out, words
):
    (tokenized / "text.mp4").write_text("hello, I am no video")
    before = {path: path.stat().st_mtime_ns for path in tokenized.rglob("*")}
    monkeypatch.setattr(LarpTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("a tokenizer was loaded"))
    assert words in refused(capsys, command, source, "-o", out, "--tokenizer", "t")
    assert {path: path.stat().st_mtime_ns for path in tokenized.rglob("*")} == before


@pytest.mark.parametrize(
    "options, words",
    [
        (["--tokenizer", "none"], "none: no such folder"),
        (["--tokenizer", "t", "--device", "nonsense"], "device 'nonsense'"),
        (["--tokenizer", "t", "--batch-size", "0"], "batch_size"),
        (["--tokenizer", "t", "--num-tokens", "7"], "7 codes: this tokenizer has 1 to 6"),
        (["--tokenizer", "t", "--num-tokens", "2", "--target-psnr", "30"], "not both"),
        (["--tokenizer", "t", "--target-psnr", "nan"], "target_psnr"),
        (["--tokenizer", "fixed", "--num-tokens", "2"], "nested"),
        (["--tokenizer", "t", "--variant", "ema"], "model.ema.safetensors"),
        (["--tokenizer", "run"], "has not written model yet"),
    ],
)
def test_bad_options_are_named(folder, capsys, options, words):
    LarpTokenizer(tiny()).save_pretrained(folder / "fixed")
    (folder / "run" / "state").mkdir(parents=True)
    assert words in refused(capsys, "reconstruct", "clip.mp4", "-o", "x.mp4", *options)
    assert not Path("x.mp4").exists()


@pytest.mark.parametrize("size", ["0", "-3"])
@pytest.mark.parametrize(
    "command", ["reconstruct clip.mp4 -o x.mp4", "tokenize clip.mp4 -o x.larp", "detokenize clip.larp -o x.mp4"]
)
def test_the_batch_size_is_at_least_one(tokenized, capsys, command, size):
    before = sorted(tokenized.rglob("*"))
    output = refused(capsys, *command.split(), "--tokenizer", "t", "--batch-size", size)
    assert f"batch_size must be a whole number of at least 1, got {size}" in output
    assert sorted(tokenized.rglob("*")) == before


def test_a_damaged_video_leaves_no_output(folder, clips_root, capsys):
    before = sorted(folder.rglob("*"))
    for command, out in (("reconstruct", "x.mp4"), ("tokenize", "x.larp")):
        output = refused(capsys, command, str(clips_root / "odd" / "corrupted.mp4"), "-o", out, "--tokenizer", "t")
        assert "corrupted.mp4" in output
    assert sorted(folder.rglob("*")) == before


@pytest.fixture
def ctrl_c():
    """Ctrl-C interrupts, as at a terminal; what a shell runs in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("command, number, status", [
    ("reconstruct clip.mp4 -o x.mp4", signal.SIGTERM, 143),
    ("reconstruct clip.mp4 -o x.mp4", signal.SIGINT, 130),
    ("tokenize clip.mp4 -o x.larp", signal.SIGTERM, 143),
    ("detokenize clip.larp -o x.mp4", signal.SIGTERM, 143),
])  # fmt: skip
def test_a_signal_ends_every_command_and_leaves_nothing(
    tokenized, monkeypatch, capsys, ctrl_c, command, number, status
):
    before, handler = sorted(tokenized.rglob("*")), signal.getsignal(signal.SIGTERM)
    real = LarpTokenizer.decode_latents, LarpTokenizer.project

    def terminated(work):
        def run(*given):
            os.kill(os.getpid(), number)
            return work(*given)

        return run

    monkeypatch.setattr(LarpTokenizer, "decode_latents", terminated(real[0]))
    monkeypatch.setattr(LarpTokenizer, "project", terminated(real[1]))
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--tokenizer", "t"])
    assert stopped.value.code == status and capsys.readouterr().err == "larp-mllm: stopped\n"
    assert sorted(tokenized.rglob("*")) == before and signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_leaves_nothing_under_the_name(folder, ctrl_c, number, status):
    """The real signal, in the middle of a real run."""
    code = (
        "import sys, time, larp.codec.whole_video as v; real = v.decode_windows\n"
        "def slow(*given): print('running', flush=True); time.sleep(30); return real(*given)\n"
        "v.decode_windows = slow\n"
        "from larp_mllm.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "reconstruct", str(folder / "clip.mp4"), "-o", str(folder / "x.mp4")]
    process = subprocess.Popen(
        [*command, "--tokenizer", str(folder / "t")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout.readline() == "running\n"
    time.sleep(0.1)
    process.send_signal(number)
    _, output = process.communicate(timeout=60)
    assert process.returncode == status and output.endswith("larp-mllm: stopped\n")
    assert sorted(path.name for path in folder.iterdir()) == ["clip.mp4", "t"]


def test_a_real_clip(folder, clips_root, capsys):
    source = sorted((clips_root / "ucf101" / "UCF-101" / "Surfing").iterdir())[0]
    main(["tokenize", str(source), "-o", "surf.larp", "--tokenizer", "t"])
    main(["detokenize", "surf.larp", "-o", "surf.mp4", "--tokenizer", "t"])
    before, after = probe(source), probe("surf.mp4")
    assert (after.frames, after.fps) == (before.frames, before.fps)
    assert larp.codec.whole_video.reconstruct_video(source, "again.mp4", LarpTokenizer.from_pretrained("t")).psnr > 3
