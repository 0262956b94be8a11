"""Laws of the tokenizer: one BOS, no loss, the right end of text, and files that load again."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from deepseek_jax.text.tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
FOLDERS = SHARED / "data" / "tokenizers"
needs_shared = pytest.mark.skipif(not FOLDERS.exists(), reason="needs the shared tokenizers folder beside the project")

ALPHABET = "0123456789+=?\n thinkasewrdo<>/\\é答"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<｜User｜>' if m.role == 'user' else '<｜Assistant｜>' }}"
    "{{ m.content }}{% if m.role != 'user' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<｜User｜>", "<｜Assistant｜>"]
USER = [{"role": "user", "content": "1+1=?"}]


@pytest.fixture(scope="module")
def characters():
    return Tokenizer.characters("".join(dict.fromkeys(ALPHABET)), chat_template=TEMPLATE)


@pytest.fixture(scope="module", params=["deepseek-r1", "deepseek-r1-distill-qwen-7b"])
def published(request):
    return Tokenizer.from_folder(FOLDERS / request.param)


def write(folder, *, config=None, files=None, bos_first=False):
    """A checkpoint folder with the vocabulary <s> 0, </s> 1, <end> 2, a 3, b 4."""
    inner = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<end>": 2, "a": 3, "b": 4}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["<s>", "</s>", "<end>"])
    if bos_first:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", **(config or {})}
    for name, content in {"tokenizer_config.json": config, **(files or {})}.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@given(
    text=st.lists(st.sampled_from([*ALPHABET, *TAGS, "<bos>", "<thi", "</"]), max_size=20)
    .map("".join)
    .filter(lambda text: "b" not in text.replace("<bos>", ""))
)
def test_characters_lose_nothing(characters, text):
    assert characters.decode(characters.encode(text, add_bos=False), skip_special=False) == text


def test_character_ids_are_fixed(characters):
    assert (characters.pad_id, characters.bos_id, characters.eos_ids) == (0, 1, (2,))
    assert [characters.encode(tag, add_bos=False) for tag in TAGS] == [[3], [4], [5], [6], [7], [8]]
    assert characters.encode("01", add_bos=True) == [1, 9, 10]
    assert characters.encode("", add_bos=True) == [1]
    assert characters.encode("", add_bos=False) == []
    assert characters.vocab_size == 9 + len(set(ALPHABET))


def test_tags_are_kept_and_special_tokens_are_not(characters):
    ids = characters.encode("<bos><think>1</think>2<eos><pad>", add_bos=False)
    assert characters.decode(ids) == "<think>1</think>2"
    assert characters.decode(ids, skip_special=False) == "<bos><think>1</think>2<eos><pad>"


@pytest.mark.parametrize("text", ["1+z", "<think>z</think>", "z", "<bos>z"])
def test_a_character_outside_the_alphabet_is_named(characters, text):
    with pytest.raises(ValueError, match="encode: got 'z'"):
        characters.encode(text, add_bos=False)


@pytest.mark.parametrize(("alphabet", "reason"), [("", "nothing"), ("aba", "'a'")])
def test_alphabets_have_distinct_characters(alphabet, reason):
    with pytest.raises(ValueError, match=reason):
        Tokenizer.characters(alphabet, chat_template="")


def test_saving_and_loading_changes_nothing(characters, tmp_path):
    characters.save(tmp_path / "a")
    again = Tokenizer.from_folder(tmp_path / "a")
    again.save(tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    assert again.chat(USER) == characters.chat(USER)
    for field in ("bos", "eos", "bos_id", "eos_ids", "pad_id", "vocab_size", "adds_bos", "chat_template"):
        assert vars(again)[field] == vars(characters)[field]
    with pytest.raises(ValueError, match="encode: got 'z'"):
        again.encode("z", add_bos=False)


def test_saving_keeps_every_file_and_the_end_of_text(tmp_path):
    files = {
        "chat_template.jinja": "a",
        "special_tokens_map.json": {"bos_token": "<s>"},
        "generation_config.json": {"eos_token_id": [1, 2]},
        "config.json": {"eos_token_id": 1},
    }
    Tokenizer.from_folder(write(tmp_path / "a", files=files)).save(tmp_path / "new" / "b")
    saved = {path.name for path in (tmp_path / "new" / "b").iterdir()}
    assert saved == {*files, "tokenizer.json", "tokenizer_config.json"} - {"config.json"}
    assert Tokenizer.from_folder(tmp_path / "new" / "b").eos_ids == (1, 2)


def test_chat_of_characters(characters):
    text = "<bos><｜User｜>1+1=?<｜Assistant｜>2<eos><｜User｜>3<｜Assistant｜><think>\n"
    messages = [*USER, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    assert characters.decode(characters.chat(messages), skip_special=False) == text
    shorter = characters.chat(messages, add_generation_prompt=False)
    assert characters.decode(shorter, skip_special=False) == text.removesuffix("<｜Assistant｜><think>\n")


@pytest.mark.parametrize("template", ["{{ bos_token }}a", "a", "{{ bos_token }}{{ bos_token }}a"])
@pytest.mark.parametrize("bos_first", [True, False])
def test_chat_begins_with_exactly_one_bos(tmp_path, template, bos_first):
    config = {"add_bos_token": True, "chat_template": template}
    tokenizer = Tokenizer.from_folder(write(tmp_path, config=config, bos_first=bos_first))
    assert tokenizer.chat(USER) == [0, 3]


@pytest.mark.parametrize(
    ("config", "bos_first", "adds"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"add_bos_token": None}, True, True),
        ({"add_bos_token": True}, False, True),
        ({"add_bos_token": False}, True, False),
        ({"add_bos_token": True, "bos_token": None}, False, False),
    ],
)
def test_only_models_that_want_a_bos_get_one(tmp_path, config, bos_first, adds):
    tokenizer = Tokenizer.from_folder(write(tmp_path, config=config, bos_first=bos_first))
    assert tokenizer.adds_bos is adds
    assert tokenizer.encode("a b", add_bos=True) == [0, 3, 4] if adds else [3, 4]
    assert tokenizer.encode("a b", add_bos=False) == [3, 4]
    assert tokenizer.encode("<s> a", add_bos=True) == [0, 3]
    assert tokenizer.encode("<s> a", add_bos=False) == [0, 3]


@pytest.mark.parametrize(
    ("files", "eos_ids"),
    [
        ({}, (1,)),
        ({"config.json": {"eos_token_id": 2}}, (1, 2)),
        ({"config.json": {"eos_token_id": [2, 3]}}, (1, 2, 3)),
        ({"config.json": {"eos_token_id": [2, 5, 999]}}, (1, 2)),
        ({"config.json": {"eos_token_id": None}}, (1,)),
        ({"config.json": {"eos_token_id": 3}, "generation_config.json": {"eos_token_id": 2}}, (1, 2)),
        ({"config.json": {"eos_token_id": 3}, "generation_config.json": {"top_p": 1}}, (1, 3)),
        ({"generation_config.json": {"eos_token_id": [2, 1]}}, (1, 2)),
    ],
)
def test_end_of_text_is_the_union(tmp_path, files, eos_ids):
    assert Tokenizer.from_folder(write(tmp_path, files=files)).eos_ids == eos_ids


def test_tokens_may_be_objects_and_templates_may_be_named(tmp_path):
    config = {
        "bos_token": {"__type": "AddedToken", "content": "<s>"},
        "pad_token": {"content": "<end>"},
        "chat_template": [{"name": "tool", "template": "b"}, {"name": "default", "template": "a"}],
    }
    tokenizer = Tokenizer.from_folder(str(write(tmp_path, config=config)))
    assert (tokenizer.bos, tokenizer.bos_id, tokenizer.pad_id, tokenizer.vocab_size) == ("<s>", 0, 2, 5)
    assert tokenizer.chat(USER) == [3]


@pytest.mark.parametrize("form", [str, lambda text: {"content": text, "lstrip": False}])
def test_special_tokens_may_stand_in_their_map_alone(tmp_path, form):
    config = {"bos_token": None, "eos_token": None, "add_bos_token": True}
    listed = {"bos_token": form("<s>"), "eos_token": form("<end>"), "pad_token": form("</s>")}
    tokenizer = Tokenizer.from_folder(write(tmp_path, config=config, files={"special_tokens_map.json": listed}))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (0, (2,), 1)
    assert tokenizer.encode("a", add_bos=True) == [0, 3]


@pytest.mark.parametrize("pad", [None, "<none>", {"content": "[PAD]"}])
def test_padding_may_be_missing(tmp_path, pad):
    assert Tokenizer.from_folder(write(tmp_path, config={"pad_token": pad})).pad_id is None


def test_no_end_is_no_end(tmp_path):
    assert Tokenizer.from_folder(write(tmp_path, config={"eos_token": None})).eos_ids == ()


@pytest.mark.parametrize("value", [5, ["<s>"], {}, {"content": 1}, True])
def test_special_tokens_of_other_types_are_named(tmp_path, value):
    with pytest.raises(ValueError, match=r"special_tokens_map\.json: eos_token: got "):
        Tokenizer.from_folder(write(tmp_path, files={"special_tokens_map.json": {"eos_token": value}}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: bos_token: got "):
        Tokenizer.from_folder(write(tmp_path, config={"bos_token": value}, files={"special_tokens_map.json": {}}))


def test_a_conversation_with_tools_takes_the_template_of_that_name(tmp_path):
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    tokenizer = Tokenizer.from_folder(write(tmp_path, config={"chat_template": named}))
    assert tokenizer.chat(USER) == [3] and tokenizer.chat(USER, tools=[{"type": "function"}]) == [4]


def test_a_template_in_a_json_file_of_its_own(tmp_path):
    folder = write(tmp_path, files={"chat_template.json": {"chat_template": "b"}})
    assert Tokenizer.from_folder(folder).chat(USER) == [4]
    assert Tokenizer.from_folder(write(tmp_path, config={"chat_template": "a"})).chat(USER) == [3]


def test_half_a_pair_of_surrogates_is_named(characters):
    with pytest.raises(ValueError, match="got '.ud800' at character 1"):
        characters.encode("1\ud800", add_bos=False)


def test_a_template_file_overrules_the_config(tmp_path):
    folder = write(tmp_path, config={"chat_template": "a"}, files={"chat_template.jinja": "b {{ extra }}"})
    assert Tokenizer.from_folder(folder).chat(USER, extra="a") == [4, 3]


@pytest.mark.parametrize(
    ("config", "files", "reason"),
    [
        ({"bos_token": "<nope>"}, {}, "tokenizer_config.json: bos_token: got '<nope>'"),
        ({"chat_template": [{"name": "x", "template": ""}]}, {}, "named 'default'"),
        ({"chat_template": 3}, {}, "chat_template: got int"),
        ({}, {"tokenizer.json": "{"}, "tokenizer.json: got invalid JSON"),
        ({}, {"tokenizer.json": "{}"}, "does not read"),
        ({}, {"tokenizer_config.json": "{'a': 1}"}, "tokenizer_config.json: got invalid JSON"),
        ({}, {"tokenizer_config.json": "[]"}, "got a JSON list, wanted an object"),
        ({}, {"generation_config.json": {"eos_token_id": [2, 5]}}, r"generation_config.json.*got \[5\]"),
        ({}, {"config.json": {"eos_token_id": "</s>"}}, "config.json: eos_token_id: got '</s>'"),
    ],
)
def test_bad_files_are_named(tmp_path, config, files, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        Tokenizer.from_folder(write(tmp_path, config=config, files=files))
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer.json"):
        Tokenizer.from_folder(tmp_path)


def test_chat_without_a_template_or_messages(tmp_path, characters):
    with pytest.raises(ValueError, match="without a chat_template"):
        Tokenizer.from_folder(write(tmp_path)).chat(USER)
    with pytest.raises(ValueError, match=r"messages\[0\]\['role'\]"):
        characters.chat([{"content": "1"}])


def test_negative_ids_are_refused(characters):
    with pytest.raises(ValueError, match="got -1"):
        characters.decode([9, -1])
    assert characters.decode([9, 99_999]) == "0"


@needs_shared
def test_published_ids():
    r1 = Tokenizer.from_folder(FOLDERS / "deepseek-r1")
    assert (r1.bos_id, r1.eos_ids, r1.vocab_size, r1.adds_bos) == (0, (1,), 128_815, True)
    assert r1.encode("<think></think><｜User｜><｜Assistant｜>", add_bos=False) == [
        128_798,
        128_799,
        128_803,
        128_804,
    ]
    qwen = Tokenizer.from_folder(FOLDERS / "deepseek-r1-distill-qwen-7b")
    assert (qwen.bos_id, qwen.eos_ids, qwen.pad_id) == (151_646, (151_643,), 151_643)


@needs_shared
def test_published_chat(published):
    messages = [
        {"role": "system", "content": "Be brief."},
        *USER,
        {"role": "assistant", "content": "I add.</think>No </think>2"},
        {"role": "user", "content": "2+2=?"},
    ]
    ids = published.chat(messages)
    assert ids.count(published.bos_id) == 1
    assert published.decode(ids, skip_special=False) == (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>1+1=?<｜Assistant｜>2<｜end▁of▁sentence｜>"
        "<｜User｜>2+2=?<｜Assistant｜><think>\n"
    )


@needs_shared
def test_published_tool_calls_go_without_content():
    r1 = Tokenizer.from_folder(FOLDERS / "deepseek-r1")
    function = {"name": "add", "arguments": '{"a": "<é>"}'}
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
    ids = r1.chat([*USER, call, {"role": "tool", "content": "3"}])
    assert r1.decode(ids, skip_special=False) == (
        "<｜begin▁of▁sentence｜><｜User｜>1+1=?"
        "<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add"
        '\n```json\n{"a": "<é>"}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>3<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    )


@needs_shared
@given(text=st.text(st.characters(codec="ascii"), max_size=60))
def test_published_tokenizers_lose_no_ascii(published, text):
    ids = published.encode(text, add_bos=True)
    assert ids[0] == published.bos_id
    assert published.decode(ids) == text
