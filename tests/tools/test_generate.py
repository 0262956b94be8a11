"""The command line of tools/generate.py: its options as users type them, on a whole small model folder."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE
from deepseek_jax.generation.engine import Engine
from deepseek_jax.text.tokenizer import Tokenizer
from tests.flags import environment

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_options_as_documented_and_the_same_from_a_converted_folder(folder, generate):
    options = ("--prompt", "1+2=?", "--max-tokens", 6, "--temperature", 0.8, "--top-p", 0.9, "--seed", 3)
    status, text, notes = generate(folder, *options)
    assert status == 0 and text.endswith("\n") and "tokens in" in notes
    assert generate(folder.with_name("converted"), *options, "--chat")[:2] == (0, text)
    assert generate(folder, *options, "--no-chat")[1] != text


@pytest.mark.slow
def test_a_model_is_divided_over_all_devices(folder):
    """Four of them, in a process of their own, and one: the same text."""
    options = ["--prompt", "1+2=?", "--max-tokens", "6", "--temperature", "0.8", "--seed", "3", "--samples", "2"]
    texts = []
    for devices, more in ((1, []), (4, ["--serve-tensor", "2"]), (4, ["--serve-expert", "2", "--serve-tensor", "1"])):
        own = os.environ | environment(devices) | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "tools/generate.py", str(folder), *options, *more]
        child = subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert child.returncode == 0, child.stderr
        texts.append(child.stdout)
    assert texts[0].strip() and texts[0] == texts[1] == texts[2]


def test_bfloat16_is_what_is_computed_in(folder, generate, monkeypatch):
    seen = []
    begin = Engine.__init__
    new = lambda self, *of, **how: seen.append(of[2].norm.dtype) or begin(self, *of, **how)
    monkeypatch.setattr(Engine, "__init__", new)
    for options in ((), ("--dtype", "float32"), ("--dtype", "bfloat16")):
        assert generate(folder, "--prompt", "1+2=?", "--max-tokens", 2, *options)[0] == 0
    assert [dtype.name for dtype in seen] == ["float32", "float32", "bfloat16"]


def test_samples_and_prompts_are_kept_apart(folder, generate, tmp_path):
    """And are those that each prompt alone gives with the same seed, whatever the batches."""
    options = ("--max-tokens", 5, "--temperature", 0.9)
    (tmp_path / "asked.txt").write_text("1+2=?\n\n3+4+5=?\n")
    several = ("--prompts", tmp_path / "asked.txt", "--samples", 2, "--seed", 7, *options)
    status, text, _ = generate(folder, *several)
    assert status == 0
    parts = re.split(r"--- prompt (\d), sample (\d), \d tokens, (?:stop|length) ---\n", text)
    found = {(int(p), int(s)): t for p, s, t in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)}
    assert list(found) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for number, prompt in enumerate(("1+2=?", "3+4+5=?")):
        for sample in range(2):
            alone = generate(folder, "--prompt", prompt, "--seed", 7 + 2 * number + sample, *options)[1]
            assert found[number, sample] == alone
    assert generate(folder, *several, "--batch", 1)[1] == text


def test_json_has_a_line_a_completion(folder, generate, tmp_path, monkeypatch):
    rows = [
        {"prompt": "1+2=?"},
        {"messages": [{"role": "user", "content": "1+2=?"}, {"role": "assistant", "content": "3"}]},
        {"prompt": [{"role": "user", "content": "3+4=?"}]},
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = ["<think>\x1b", " 1 and 2<", "/think>", "3"]
    decode = lambda self, ids, **of: "".join(written[: len(ids)]) if len(ids) <= 4 else "<think>\n"
    monkeypatch.setattr(Tokenizer, "decode", decode)
    options = ("--samples", 2, "--json", "--max-tokens", 4, "--min-tokens", 4, "--batch", 4)
    status, text, _ = generate(folder, "--prompts", tmp_path / "asked.jsonl", *options)
    found = [json.loads(line) for line in text.splitlines()]
    assert status == 0 and [(each["prompt"], each["sample"]) for each in found] == [
        (p, s) for p in range(3) for s in (0, 1)
    ]
    for each in found:
        assert each.keys() == {"prompt", "sample", "text", "thinking", "answer", "tokens", "finish_reason", "seconds"}
        assert (each["thinking"], each["answer"]) == ("\x1b 1 and 2", "3")
        assert (each["tokens"], each["finish_reason"]) == (4, "length") and each["text"] == "".join(written)
    assert all(character.isprintable() for character in text.replace("\n", ""))


def test_log_probs_of_every_token_and_of_the_best_ones_beside_it(folder, generate):
    options = ("--prompt", "1+2=?", "--max-tokens", 6, "--temperature", 0, "--json", "--seed", 3)
    (found,) = map(json.loads, generate(folder, *options, "--logprobs", 3)[1].splitlines())
    tokenizer = Tokenizer.from_folder(folder)
    assert len(found["logprobs"]) == found["tokens"]
    for each in found["logprobs"]:
        assert each.keys() == {"id", "text", "logprob", "top"} and len(each["top"]) == 3
        assert each["top"][0] == {name: each[name] for name in ("id", "text", "logprob")}  # the best one was taken
        values = [of["logprob"] for of in each["top"]]
        assert values == sorted(values, reverse=True) and values[0] < 0 and sum(map(math.exp, values)) < 1
        assert all(of["text"] == tokenizer.decode([of["id"]], skip_special=False) for of in each["top"])
    assert tokenizer.decode([each["id"] for each in found["logprobs"]]) == found["text"]
    none = json.loads(generate(folder, *options, "--logprobs", 0)[1])["logprobs"]
    assert none == [each | {"top": []} for each in found["logprobs"]]


def test_the_engines_settings_are_options(folder, generate, tmp_path):
    """Each of them shows in what is drawn, and a file of settings says the same."""
    fixed = ("--prompt", "1+2=?", "--max-tokens", 12, "--temperature", 0, "--json")
    ask = lambda *more: json.loads(generate(folder, *fixed, *more)[1])
    plain = ask()
    assert plain["finish_reason"] == "length" and plain["tokens"] == 12
    stopped = ask("--stop", "no such text", plain["text"][4:6])
    assert stopped["text"] == plain["text"].partition(plain["text"][4:6])[0] and stopped["finish_reason"] == "stop"
    ids = {text: token for token in range(9, 25) for text in [Tokenizer.from_folder(folder).decode([token])]}
    assert ask("--logit-bias", f"{ids['7']}=100")["text"] == "7" * 12
    assert len(set(ask("--logit-bias", f"{ids['7']}=1", f"{ids['8']}=1", "--frequency-penalty", 2)["text"])) > 4
    assert ask("--logit-bias", "2=100")["tokens"] == 1  # <eos>
    assert ask("--logit-bias", "2=100", "--min-tokens", 5)["tokens"] == 6
    (opening,) = Tokenizer.from_folder(folder).encode("<think>", add_bos=False)
    thought = ask("--logit-bias", f"{opening}=100", "--thinking-budget", 3)
    assert thought["thinking"] == "<think>" * 3 + "\n" and thought["tokens"] == 12
    (tmp_path / "a.toml").write_text(f"[sampling]\nlogit_bias = ['{ids['7']}=100']\n[engine]\nbatch = 2\n")
    assert ask("--config", tmp_path / "a.toml")["text"] == "7" * 12


def test_speculation_changes_no_token(folder, generate):
    options = ("--prompt", "1+1+1+1+1+1+1=?", "--max-tokens", 12, "--temperature", 0.5, "--seed", 3)
    plain = generate(folder, *options)
    drafted = generate(folder, *options, "--speculate", "lookup", "--draft-tokens", 2)
    assert plain[0] == drafted[0] == 0 and plain[1] == drafted[1]
    told = r"\d+ of \d+ drafts were right \(\d+\.\d%\), \d\.\d\d tokens a step, \d+\.\d% of the steps saved\n"
    assert re.search(told, drafted[2]) and "drafts" not in plain[2]


def test_a_cache_of_codes_is_an_option(folder, generate):
    """The first token's log-prob is of a prompt that was read as codes: near to the exact one, and not the same."""
    options = ("--prompt", "1+1+1+1+1+1+1=?", "--max-tokens", 1, "--temperature", 0, "--json", "--logprobs", 0)
    kinds = "auto", "int8", "fp8"
    exact, int8, fp8 = (
        json.loads(generate(folder, *options, "--kv-cache-dtype", kind)[1])["logprobs"][0]["logprob"] for kind in kinds
    )
    assert 0 < abs(int8 - exact) < 0.05 and 0 < abs(fp8 - exact) < 0.2


def test_progress_is_on_the_terminal_of_standard_error_and_standard_output_is_clean(folder, generate, monkeypatch):
    options = ("--prompt", "1+2=?", "--samples", 6, "--max-tokens", 4, "--json", "--batch", 4)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    status, text, notes = generate(folder, *options)
    assert status == 0 and [json.loads(line)["sample"] for line in text.splitlines()] == [0, 1, 2, 3, 4, 5]
    assert "generate" in notes and "6/6" in notes and "tokens/s" in notes


def test_a_prompt_comes_from_standard_input(folder, generate, monkeypatch):
    wanted = generate(folder, "--prompt", "1+2=?", "--max-tokens", 3)[1]
    monkeypatch.setattr("sys.stdin", io.StringIO("1+2=?\n"))
    assert generate(folder, "--prompt", "-", "--max-tokens", 3)[:2] == (0, wanted)


def test_a_system_text_begins_the_conversation(folder, generate, tmp_path):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{{ raise_exception(messages|map(attribute='role')|join(' ') ~ ': ' ~ messages[0].content) }}"
    )
    asks = variant(folder, tmp_path / "asks", tokenizer_config__json=config)
    assert "system user: be brief" in generate(asks, "--prompt", "1", "--system", "be brief")[2]
    assert "system: got it with --no-chat" in generate(asks, "--prompt", "1", "--system", "x", "--no-chat")[2]
    (tmp_path / "asked.jsonl").write_text(json.dumps({"messages": [{"role": "system", "content": "no"}]}))
    refused = generate(asks, "--prompts", tmp_path / "asked.jsonl", "--system", "x")[2]
    assert "system: got it beside a conversation with a system's turn" in refused


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", "a.txt: got no line with a prompt"),
        ("a.jsonl", '{"question": "1"}', 'wanted "prompt", a text, or "messages", a conversation'),
        ("a.jsonl", '{"prompt": 1}', 'wanted "prompt", a text'),
        ("a.jsonl", '{"prompt": "1"}\n{"prompt": "hello"}', "prompt 1: encode: got 'h', wanted text"),
        ("a.jsonl", '{"prompt": "1"}\n{"messages": [{"content": "1"}]}', "prompt 1: messages[0]['role']: got None"),
        ("a.jsonl", '{"prompt": "1"}\n{"prompt": "' + "1" * 300 + '"}', "prompt 1: got 303 tokens, wanted at most 255"),
        ("a.txt", None, "a.txt: no such file"),
        ("a.jsonl", None, "a.jsonl: no such file"),
    ],
)
def test_a_mistaken_file_of_prompts_is_one_line(folder, generate, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    status, text, error = generate(folder, "--prompts", tmp_path / name, "--batch", 1)
    assert status == 1 and not text and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "1", "--serve-tensor", "3"), "error: mesh: expert 1 x tensor 3 do not divide the 1 devices"),
        (("--prompt", "hello"), "error: encode: got 'h', wanted text"),
        (("--prompt", "1" * 300), "error: prompt: got 303 tokens, wanted at most 255"),
        (
            ("--prompt", "1" * 240, "--max-tokens", "20", "--min-tokens", "20"),
            "error: prompt: got 243 tokens, wanted at",
        ),
        (("--prompt", "", "--no-chat", "--system", "x"), "error: system: got it with --no-chat"),
        (("--prompt", "1", "--top-p", "0"), "error: top_p: got 0.0"),
        ((), "error: wanted either --prompt TEXT or --prompts FILE"),
        (("--prompt", "1", "--prompts", "a.txt"), "error: wanted either --prompt TEXT or --prompts FILE"),
        (("--prompt", "1", "--samples", "0"), "error: samples: got 0, wanted at least 1"),
        (("--prompt", "1", "--max-tokens", "0"), "error: max_tokens: got 0, wanted at least 1"),
        (("--prompt", "1", "--min-tokens", "300"), "error: min_tokens: got 300, wanted at most max_tokens, 256"),
        (("--prompt", "1", "--stop", ""), "error: stop: got ('',), wanted a text or a list"),
        (("--prompt", "1", "--logprobs", "2"), "error: logprobs: got it for plain text"),
        (("--prompt", "1", "--json", "--logprobs", "21"), "error: logprobs: got 21, wanted 0 to 20"),
        (("--prompt", "1", "--logit-bias", "a=1"), "error: logit_bias: got 'a=1', wanted ID=BIAS"),
        (("--prompt", "1", "--logit-bias", "999=1"), "error: logit_bias: got token 999, wanted ids below the model's"),
        (("--prompt", "1", "--draft-tokens", "2"), "error: draft_tokens: got it without drafts, wanted --speculate"),
        (("--prompt", "1", "--speculate", "mtp"), 'error: drafts: got "mtp" for a model without MTP modules'),
    ],
)
def test_mistakes_are_one_line_before_the_model_is_loaded(folder, generate, monkeypatch, arguments, message):
    monkeypatch.setattr("deepseek_jax.commands.generate.load_model", lambda *of, **how: pytest.fail("it was loaded"))
    status, _, error = generate(folder, *arguments)
    assert status == 1 and error.startswith(message) and error.count("\n") == 1


def variant(folder, target, **files):
    """A copy of a model's folder with other files of text; None leaves one out."""
    shutil.copytree(folder, target)
    for name, content in files.items():
        path = target / name.replace("__", ".")
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(json.dumps(content))
    return target


def test_a_model_without_a_template_is_not_sent_raw_text_as_a_chat(folder, generate, tmp_path):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    bare = variant(folder, tmp_path / "bare", tokenizer_config__json=config)
    status, text, error = generate(bare, "--prompt", "1+2=?")
    assert status == 1 and not text and error.count("\n") == 1 and "--no-chat" in error
    raw = generate(bare, "--prompt", "1+2=?", "--max-tokens", 2, "--no-chat")
    assert raw[0] == 0 and raw[1] == generate(folder, "--prompt", "1+2=?", "--max-tokens", 2, "--no-chat")[1]


def test_sampling_without_an_end_is_said(folder, generate, tmp_path):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    model = json.loads((folder / "config.json").read_text())
    del config["eos_token"]
    endless = variant(
        folder, tmp_path / "endless", tokenizer_config__json=config, config__json={**model, "eos_token_id": None}
    )
    status, _, notes = generate(endless, "--prompt", "1", "--max-tokens", 2)
    assert status == 0 and "names no end-of-sequence token; sampling ends at --max-tokens" in notes


def test_the_switch_of_thinking_is_the_templates(folder, generate, tmp_path):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ raise_exception('thinking is ' ~ thinking) }}"
    asks = variant(folder, tmp_path / "asks", tokenizer_config__json=config)
    assert "thinking is True" in generate(asks, "--prompt", "1", "--thinking", "True")[2]
    assert "thinking is False" in generate(asks, "--prompt", "1", "--thinking", "False")[2]
    for switch in ("True", "False"):
        assert "leave one out" in generate(asks, "--prompt", "1", "--no-chat", "--thinking", switch)[2]


def test_what_a_template_says_does_not_reach_the_terminal_raw(folder, generate, tmp_path):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = r"{{ raise_exception('\x1b[2J\x1b]0;owned\x07 no\nsuch \u202echat') }}"
    status, _, error = generate(variant(folder, tmp_path / "asks", tokenizer_config__json=config), "--prompt", "1")
    assert status == 1 and error.count("\n") == 1 and r"\x1b[2J\x1b]0;owned\x07 no such \u202echat" in error
    assert error[:-1].isprintable()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_completion_is_escaped_on_a_terminal_alone(terminal, folder, generate, monkeypatch):
    written = "\x1b[31mred\x07\n\ttab 5\u202f%, 5\u2009m"
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids, **of: written if ids else "")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    status, text, _ = generate(folder, "--prompt", "1", "--max-tokens", 2)
    assert status == 0 and text == (r"\x1b[31mred\x07" + "\n\ttab 5\u202f%, 5\u2009m" if terminal else written) + "\n"


def test_ids_that_the_model_does_not_have_are_refused(folder, generate, tmp_path):
    tokenizer = Tokenizer.characters(ALPHABET + "".join(map(chr, range(0x4E00, 0x5E00))), chat_template=TEMPLATE)
    wide = variant(folder, tmp_path / "wide")
    tokenizer.save(wide)
    status, _, error = generate(wide, "--prompt", chr(0x5DFF))
    assert status == 1 and "wanted ids below the model's vocab_size" in error and error.count("\n") == 1


def test_a_mistyped_folder_is_named(tmp_path, generate):
    status, _, error = generate(tmp_path / "nowhere", "--prompt", "1")
    assert status == 1 and "nowhere: no such folder" in error and error.count("\n") == 1
