"""Text documents from files and data sets, cut into pieces."""

import json
import socket
import sys
import time
from types import SimpleNamespace

from larp import hub_files
from larp_mllm.data.text_data import TextSet, open_text
from larp_mllm.model.vocabulary import IGNORE, Vocabulary
from larp_mllm.processing.token_sequence import Layout

import pytest

FRAMED = Layout(Vocabulary(300, 8, 2), 1, 2)
BARE = Layout(Vocabulary(300, 8, 2), None, None)


def encode(text):
    return [10 + ord(letter) - ord("a") for letter in text]


def ids(pieces):
    return [pieces[i].ids.tolist() for i in range(len(pieces))]


def test_a_long_document_is_cut_into_pieces_and_each_of_its_ids_is_predicted_once():
    pieces = TextSet(["abcdefg"], encode, FRAMED, 4)
    whole = [1, *encode("abcdefg"), 2]
    assert ids(pieces) == [whole[0:4], whole[3:7], whole[6:9]], "each begins with the last id of the one before"
    predicted = [label for i in range(len(pieces)) for label in pieces[i].labels.tolist() if label != IGNORE]
    assert predicted == whole[1:]
    assert sum(pieces[i].targets for i in range(len(pieces))) == len(whole) - 1


@pytest.mark.parametrize("length", range(2, 12))
def test_no_id_is_dropped_for_any_length(length):
    for layout in (FRAMED, BARE):
        pieces = TextSet(["abcdefg", "", "a", " \n"], encode, layout, length)
        assert max(map(len, ids(pieces))) <= length
        targets = sum(pieces[i].targets for i in range(len(pieces)))
        assert targets == (8 + 2 if layout is FRAMED else 6)


def test_pieces_of_under_two_ids_and_documents_without_text_are_refused():
    with pytest.raises(ValueError, match="at least 2 ids, got 1: raise --sequence-length"):
        TextSet(["a"], encode, BARE, 1)
    with pytest.raises(ValueError, match="none of the 2 documents holds text"):
        TextSet(["", " "], encode, BARE, 8)


def texts(count, size=6):
    """Distinct documents with these numbers of letters."""
    return ["".join(chr(97 + (number // 26**place) % 26) for place in range(size)) for number in range(count)]


def test_whole_documents_are_held_out_if_they_are_enough():
    documents = texts(8)
    train, held, unit = TextSet(documents, encode, BARE, 3).hold_out(4, enough=12)
    assert unit == "document"
    assert ids(held) == ids(TextSet([documents[3], documents[7]], encode, BARE, 3))
    assert ids(train) == ids(TextSet([*documents[:3], *documents[4:7]], encode, BARE, 3))


LONG = "".join(texts(100))


@pytest.mark.parametrize(
    "documents",
    [[LONG], [LONG, "yz"], ["ab", "cd", "ef", "gh", "ij", LONG]],
    ids=["one", "one long and one tiny", "the held-out one is nearly all"],
)
def test_pieces_are_held_out_if_documents_are_not_enough(documents):
    pieces = TextSet(documents, encode, BARE, 30)
    train, held, unit = pieces.hold_out(6, enough=16)
    assert unit == "piece"
    assert ids(held) == ids(pieces)[5::6]
    assert ids(train) == [piece for number, piece in enumerate(ids(pieces)) if number % 6 != 5]


def test_too_little_text_is_not_split():
    assert TextSet(texts(8), encode, BARE, 3).hold_out(4, enough=19) is None
    assert TextSet(["abcdefgh"], encode, BARE, 3).hold_out(20, enough=1) is None
    assert TextSet(["itrained"] * 40, encode, BARE, 30).hold_out(enough=1) is None, "all the same"


def test_equal_documents_stay_on_one_side():
    documents = [text for text in texts(40) for _ in range(2)]
    train, held, _ = TextSet(documents, encode, BARE, 16).hold_out(20, enough=1)
    assert len(held) == 4 and len(train) == 76
    assert not {tuple(row) for row in ids(held)} & {tuple(row) for row in ids(train)}


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n"])
def test_all_line_ends_are_read_as_one_line_break(tmp_path, end):
    (tmp_path / "a.txt").write_bytes("one\ntwo\n\nthree\u2028x\n".replace("\n", end).encode())
    (tmp_path / "b.jsonl").write_bytes('{"text": "four"}\n{"text": "five"}'.replace("\n", end).encode())
    found = open_text((f"txt:{tmp_path}/a.txt", f"jsonl:{tmp_path}/b.jsonl"))
    assert [document.strip("\n") for document in found] == ["one\ntwo", "three\u2028x", "four", "five"]


def test_documents_come_from_text_files_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n \nthree\n\n")
    (tmp_path / "b.jsonl").write_text('{"text": "four", "id": 1}\n\n{"text": "five"}\n')
    found = open_text((f"txt:{tmp_path}/a.txt", f"jsonl:{tmp_path}/b.jsonl"))
    assert [document.strip() for document in found] == ["one\ntwo", "three", "four", "five"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a"}\n{"text": 5}\n', r"b.jsonl:2: text must be a text, got 5"),
        ('{"text": "a"}\nhello\n', r"b.jsonl:2: broken JSON"),
        ('{"content": "a"}\n', r'b.jsonl:1: each line must be an object with a "text"'),
        ("[" * 100_000, r"b.jsonl:1: broken JSON"),
        ('{"text": "\\ud800"}\n', "half a character"),
        ("\n", "holds no text"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_broken_lines_are_errors(tmp_path, content, said):
    (tmp_path / "b.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=said):
        open_text([f"jsonl:{tmp_path}/b.jsonl"])


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("wiki.txt", "give txt:FILE, jsonl:FILE or hf:NAME"),
        ("csv:a.csv", "give txt:FILE"),
        ("txt:", "give txt:FILE"),
        ("txt:/nowhere.txt", r"text txt:/nowhere.txt: there is no file"),
        ("hf:a/b,rows=5", "'rows=5' is no option; known are config=, split=, column="),
        ("hf:a/b,split=", "split= has no value: write split=..., or leave it out"),
        ("hf:https://example.org/a", "URLs are not opened"),
        ("hf:,split=train", "nothing is neither"),
        ("hf:json", "json is neither a name of the hub"),
    ],
)
def test_unknown_specs_are_errors_with_the_remedy(spec, said):
    with pytest.raises(ValueError, match=said):
        open_text([spec])


def test_a_missing_package_is_an_error_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'larp-mllm\[text\]'"):
        open_text(["hf:owner/name"])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of JSON lines that the package `datasets` reads, without network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "wiki").mkdir()
    for split, words in (("train", ["one", "", "two"]), ("test", ["three"])):
        rows = [json.dumps({"text": word, "title": f"T{word}"}) for word in words]
        (tmp_path / "wiki" / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path / "wiki"


@pytest.mark.slow
def test_data_sets_are_read_by_split_and_column(folder):
    assert open_text([f"hf:{folder}"]) == ["one", "", "two"]
    assert open_text([f"hf:{folder},split=test,column=title"]) == ["Tthree"]
    assert open_text([f"hf:{folder},split=train[:1]"]) == ["one"]
    with pytest.raises(ValueError, match=r"no column 'body'; column= one of text, title"):
        open_text([f"hf:{folder},column=body"])
    with pytest.raises(ValueError, match=r"cannot be loaded .*Check its name, config= and split="):
        open_text([f"hf:{folder},split=dev"])


@pytest.mark.slow
def test_code_of_a_data_set_is_never_run(folder, tmp_path):
    (folder / "wiki.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"cannot be loaded .*scripts"):
        open_text([f"hf:{folder}"])
    with pytest.raises(ValueError, match="neither a name of the hub"):
        open_text([f"hf:{folder}/wiki.py"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_an_unknown_name_is_an_error_with_the_remedy(folder):
    with pytest.raises(ValueError, match=r"hf:nobody/nothing: the data set cannot be loaded.*local cache"):
        open_text(["hf:nobody/nothing"])


@pytest.fixture
def stand_in(monkeypatch):
    """A package `datasets` with a set in its cache, owner/cached, and a hub that takes connections and answers nothing."""
    config = SimpleNamespace(HF_HUB_OFFLINE=False)

    def load_dataset(name, config_name, split):
        if not config.HF_HUB_OFFLINE:
            pytest.fail("the hub was asked")
        if name != "owner/cached":
            raise ConnectionError("not in the cache")
        return Rows({"text": ["one", "two"]})

    class Rows(dict):
        column_names = ("text",)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(config=config, load_dataset=load_dataset))
    monkeypatch.setattr(hub_files, "_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.hf_hub_url", lambda name, file, repo_type: f"{address}/{name}/{file}")
        yield config


def test_a_cached_data_set_does_not_wait_for_the_hub(stand_in):
    began = time.monotonic()
    assert open_text(["hf:owner/cached"]) == ["one", "two"] and time.monotonic() - began < 0.3
    assert not stand_in.HF_HUB_OFFLINE
    with pytest.raises(ValueError, match=r"owner/other: .*no answer from 127\.0\.0\.1:\d+ within 0\.3 seconds"):
        open_text(["hf:owner/other"])


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_both_variables_keep_text_away_from_the_network(variable, stand_in, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("the network was asked"))
    assert open_text(["hf:owner/cached"]) == ["one", "two"]
    with pytest.raises(ValueError, match=f"owner/other: .*{variable} is set"):
        open_text(["hf:owner/other"])
