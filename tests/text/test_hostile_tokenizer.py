"""Laws of tokenizers that mean harm or are broken: one line each, within bounds of time and memory."""

import json
import os
import time

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from deepseek_jax.text import confined
from deepseek_jax.text.tokenizer import Tokenizer
from tests.text.peaks import peaks


def whole():
    """A tokenizer of the bytes, as JSON."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["<e>", *alphabet])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<e>"])
    return json.loads(inner.to_str())


def write(folder, *, tokenizer=None, **files):
    tokenizer = whole() if tokenizer is None else tokenizer
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": {"eos_token": "<e>"}, **files}
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)
    return folder


def changed(**parts):
    return {**whole(), **parts}


def model(**parts):
    return changed(model={**whole()["model"], **parts})


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(old, new):
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def nested(depth):
    part = {"type": "Lowercase"}
    for _ in range(depth):
        part = {"type": "Sequence", "normalizers": [part]}
    return part


def added(**parts):
    token = {"id": 257, "content": "zz", "single_word": False, "lstrip": False, "rstrip": False}
    return changed(added_tokens=[*whole()["added_tokens"], {**token, "normalized": False, "special": True, **parts}])


def template(single, **tokens):
    return changed(
        post_processor={"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": tokens}
    )


SPECIAL = {"SpecialToken": {"id": "<none>", "type_id": 0}}
UNREADABLE = {
    "no JSON": "{",
    "nothing": "",
    "a list": [],
    "no model": {k: v for k, v in whole().items() if k != "model"},
    "a model of no known type": changed(model={"type": "Python", "code": "import os"}),
    "a model that is text": changed(model="BPE"),
    "deep JSON": '{"model":' + "[" * 100_000 + "]" * 100_000 + "}",
    "deep objects": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "deep normalizers": json.dumps(changed()).replace('"normalizer": null', f'"normalizer": {json.dumps(nested(300))}'),
    "an empty vocabulary": model(vocab={}),
    "no token at all": changed(model={"type": "WordLevel", "vocab": {}, "unk_token": "x"}, added_tokens=[]),
    "a negative id": model(vocab={**whole()["model"]["vocab"], "zz": -1}),
    "an id beyond 32 bits": model(vocab={**whole()["model"]["vocab"], "zz": 2**32}),
    "an id beyond 31 bits": model(vocab={**whole()["model"]["vocab"], "zz": 2**31}),
    "an id with a fraction": model(vocab={**whole()["model"]["vocab"], "zz": 1.5}),
    "an id of many digits": model(vocab={**whole()["model"]["vocab"], "zz": 10**400}),
    "a merge of unknown tokens": model(merges=["zz zz"]),
    "a merge of one": model(merges=["a"]),
    "unclosed regex": changed(pre_tokenizer=split("(")),
    "deep regex": changed(pre_tokenizer=split("(" * 50_000 + ")" * 50_000)),
    "a post-processor of an unknown token": template([SPECIAL]),
    "a precompiled map of noise": changed(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA" + "/" * 4000}
    ),
    "an added token without text": added(content=5),
    "an added token of a negative id": added(id=-1),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, name):
    with pytest.raises(ValueError, match=r"tokenizer\.json: got ") as caught:
        Tokenizer.from_folder(write(tmp_path, tokenizer=UNREADABLE[name]))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


MANY = [replace("a", "a" * 10)] * 9
HOSTILE_TEXTS = {
    "a pattern of nested repeats": (changed(pre_tokenizer=split("(a+)+$")), "a" * 60 + "!"),
    "a pattern of alternatives": (changed(pre_tokenizer=split("(a|aa)+$")), "a" * 99 + "!"),
    "a pattern that looks back and ahead": (changed(pre_tokenizer=split("(?=(a+))(a*)*b")), "a" * 5000),
    "a normalizer's pattern": (
        changed(normalizer={"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": ""}),
        "x" * 60,
    ),
    "a normalizer that multiplies": (changed(normalizer={"type": "Sequence", "normalizers": MANY}), "a" * 20),
    "a normalizer that puts text before": (
        changed(
            normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 50_000}, *MANY[:4]]}
        ),
        "b",
    ),
    "a normalizer that replaces the empty text": (
        changed(normalizer={"type": "Sequence", "normalizers": [replace("", "b" * 1000)] * 4}),
        "ab",
    ),
}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(confined, "SECONDS", 0.5)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", HOSTILE_TEXTS)
def test_a_text_that_takes_too_much_is_refused_when_it_comes(tmp_path, name):
    content, text = HOSTILE_TEXTS[name]
    tokenizer = Tokenizer.from_folder(write(tmp_path, tokenizer=content))
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="^encode: ") as caught:
        tokenizer.encode(text, add_bos=False)
    assert time.perf_counter() - begin < 20 and "\n" not in str(caught.value)
    # A text that it can take is encoded afterwards, whatever happened to the process.
    assert tokenizer.encode("", add_bos=False) == []


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "Sequence", "decoders": [replace("a", "a" * 10)] * 9},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, *[replace("a", "a" * 1000)] * 3]},
    ],
)
def test_a_decoder_that_multiplies_is_refused(tmp_path, decoder):
    tokenizer = Tokenizer.from_folder(write(tmp_path, tokenizer=changed(decoder=decoder)))
    ids = tokenizer.encode("a" * 30, add_bos=False)
    with pytest.raises(ValueError, match="^decode: "):
        tokenizer.decode(ids)


def test_a_hostile_tokenizer_takes_no_memory_here(tmp_path):
    write(tmp_path, tokenizer=HOSTILE_TEXTS["a normalizer that multiplies"][0])
    own, others = peaks(
        "import pytest; from pathlib import Path; from deepseek_jax.text.tokenizer import Tokenizer\n"
        f"tokenizer = Tokenizer.from_folder(Path({str(tmp_path)!r}))",
        "with pytest.raises(ValueError): tokenizer.encode('a' * 20, add_bos=False)",
    )
    assert own < 50_000 and 50_000 < others < 1.1 * 2**20  # KiB


@pytest.mark.parametrize(
    "odd",
    [
        model(vocab={**whole()["model"]["vocab"], "zz": 5}),
        changed(truncation={"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}),
        changed(
            padding={
                **{"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None},
                **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<e>"},
            }
        ),
        added(content=""),
        added(id=10**9),
    ],
    ids=["an id twice", "truncation", "padding", "an added token of no text", "an added token far away"],
)
def test_what_is_merely_odd_works(tmp_path, odd):
    tokenizer = Tokenizer.from_folder(write(tmp_path, tokenizer=odd))
    assert tokenizer.decode(tokenizer.encode("Ab é答", add_bos=False)) == "Ab é答"


def test_hostile_tokenizers_leave_the_others_as_they_were(tmp_path):
    (tmp_path / "good").mkdir()
    good = Tokenizer.from_folder(write(tmp_path / "good"))
    ids = good.encode("12", add_bos=False)
    (tmp_path / "bad").mkdir()
    for content in (UNREADABLE["deep JSON"], UNREADABLE["a post-processor of an unknown token"]):
        with pytest.raises(ValueError):
            Tokenizer.from_folder(write(tmp_path / "bad", tokenizer=content))
        assert good.encode("12", add_bos=False) == ids
    others = [Tokenizer.characters("ab"[: n % 2 + 1] + str(n), chat_template="") for n in range(6)]
    assert [t.encode(str(n), add_bos=False) for n, t in enumerate(others)] == [[10 + n % 2] for n in range(6)]
    assert good.encode("12", add_bos=False) == ids


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "link to nothing", "endless device"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, name, kind):
    write(tmp_path)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    make = {
        "fifo": lambda: os.mkfifo(path),
        "folder": lambda: path.mkdir(),
        "link to nothing": lambda: path.symlink_to("nothing"),
        "endless device": lambda: path.symlink_to("/dev/zero"),
    }
    make[kind]()
    with pytest.raises(ValueError, match=f"{name}: got something that is no regular file"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "special_tokens_map.json"])
def test_files_of_absurd_size_are_not_read(tmp_path, name):
    write(tmp_path)
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=f"{name}: got {2**40} bytes, wanted at most"):
        Tokenizer.from_folder(tmp_path)


def test_a_pointer_of_git_lfs_is_called_that(tmp_path):
    write(tmp_path, tokenizer="version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7847602\n")
    with pytest.raises(ValueError, match=r"tokenizer\.json: got a git-lfs pointer"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "advice"),
    [("tiktoken.model", "convert_tiktoken_to_fast"), ("tokenizer.model", "AutoTokenizer"), ("vocab.json", "AutoToken")],
)
def test_tokenizers_of_other_forms_say_what_to_do(tmp_path, name, advice):
    (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=f"got no tokenizer.json.*{name}.*{advice}") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)
