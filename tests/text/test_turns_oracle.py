"""The learnt tokens beside those of transformers and of TRL, under templates of published models."""

import json
from pathlib import Path

import numpy as np
import pytest

from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.text.turns import chat_tokens, text_tokens
from tests.text.test_tokenizer import FOLDERS, needs_shared

pytestmark = [pytest.mark.oracle, needs_shared]

QWEN = FOLDERS / "deepseek-r1-distill-qwen-7b"
CONVERSATIONS = {
    "one turn": [("user", "What is 1+1?"), ("assistant", "It is 2.")],
    "several turns": [
        ("user", "Hello  你好"),
        ("assistant", "Hi!\nHow are you?"),
        ("user", "é?\n\n"),
        ("assistant", "naïve 请用中文 \\boxed{3}"),
    ],
    "a question last": [("user", "a"), ("assistant", "b c"), ("user", "d")],
}
SYSTEM = [("system", "You are brief.")]


def messages(turns) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def templates() -> Path:
    trl = pytest.importorskip("trl", reason="needs the oracle extra with trl")
    return Path(trl.__file__).parent / "chat_templates"


def both(tmp_path: Path, template: str, oracle_template: str | None = None):
    """R1-Distill-Qwen's tokenizer under a template of TRL's: ours, and transformers'."""
    transformers = pytest.importorskip("transformers", reason="needs the oracle extra")
    config = json.loads((QWEN / "tokenizer_config.json").read_text())
    for name, of in (("ours", template), ("theirs", oracle_template or template)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_bytes((QWEN / "tokenizer.json").read_bytes())
        source = (templates() / f"{of}.jinja").read_text()
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": source}))
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "theirs")
    return Tokenizer.from_folder(tmp_path / "ours"), oracle


def masks_of_transformers(oracle, turns) -> tuple[list[int], list[int]]:
    text = oracle.apply_chat_template(
        messages(turns), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return text["input_ids"], text["assistant_masks"]


MARKED = ["qwen2_5_training", "llama3_training", "gemma_training", "phi3_training", "deepseekv3_training"]


@pytest.mark.parametrize("name", MARKED)
def test_under_generation_tags_tokens_and_mask_are_those_of_transformers(tmp_path, name):
    ours, oracle = both(tmp_path, name)
    for title, turns in CONVERSATIONS.items():
        found = chat_tokens(ours, messages(turns))
        ids, mask = masks_of_transformers(oracle, turns)
        begin = len(found.tokens) - len(ids)  # a BOS that a template leaves out and this tokenizer wants
        assert begin in (0, 1) and found.tokens[begin:].tolist() == ids, title
        assert found.mask[begin:].tolist() == [bool(of) for of in mask], title


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma"])
def test_without_tags_the_mask_is_that_of_trls_template_with_them_but_for_line_breaks(tmp_path, name):
    """TRL's tags take in line breaks around a turn; in what stands between them nothing may differ."""
    ours, oracle = both(tmp_path, name, f"{name}_training")
    for title, turns in CONVERSATIONS.items():
        if name != "gemma":
            turns = SYSTEM + turns
        found = chat_tokens(ours, messages(turns))
        ids, mask = masks_of_transformers(oracle, turns)
        begin = len(found.tokens) - len(ids)
        assert begin in (0, 1) and found.tokens[begin:].tolist() == ids, title
        differ = np.flatnonzero(found.mask[begin:] != np.array(mask, bool))
        assert all(mask[i] and not ours.decode([ids[i]]).strip() for i in differ), title
        assert found.unlearnt == 0 and found.mask.any()
        if name == "llama3":
            assert not len(differ), title


def labels_of_trl(oracle, row, tmp_path, **settings) -> tuple[list[int], list[int]]:
    """Token ids and labels that TRL's trainer makes of a row."""
    needed = ("trl", "transformers", "datasets")
    trl, transformers, datasets = (pytest.importorskip(name, reason="needs the oracle extra") for name in needed)
    tiny = transformers.Qwen2Config(
        vocab_size=152_064,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    args = trl.SFTConfig(output_dir=str(tmp_path / "trl"), report_to=[], use_cpu=True, bf16=False, **settings)
    trainer = trl.SFTTrainer(
        transformers.Qwen2ForCausalLM(tiny),
        args,
        train_dataset=datasets.Dataset.from_list([row]),
        processing_class=oracle,
    )
    made = trainer.train_dataset[0]
    return list(made["input_ids"]), list(made["labels"])


def learnt(ids: list[int], labels: list[int]) -> list[bool]:
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    return [label != -100 for label in labels]


def test_assistant_only_loss_of_trl(tmp_path):
    ours, oracle = both(tmp_path, "llama3")  # TRL takes its own template with tags for it
    turns = CONVERSATIONS["several turns"]
    ids, labels = labels_of_trl(oracle, {"messages": messages(turns)}, tmp_path, assistant_only_loss=True)
    found = chat_tokens(ours, messages(turns))
    begin = len(found.tokens) - len(ids)
    assert found.tokens[begin:].tolist() == ids and found.mask[begin:].tolist() == learnt(ids, labels)


@pytest.mark.parametrize("name", ["llama3", "deepseek_r1_distill"])
def test_completion_only_loss_of_trl_on_messages(tmp_path, name):
    """Earlier answers belong to the prompt. R1's template opens an answer otherwise than it shows one."""
    ours, oracle = both(tmp_path, name)
    turns = messages(CONVERSATIONS["several turns"])
    row = {"prompt": turns[:3], "completion": turns[3:]}
    ids, labels = labels_of_trl(oracle, row, tmp_path, completion_only_loss=True)
    found = chat_tokens(ours, turns, history=3)
    begin = len(found.tokens) - len(ids)
    assert found.tokens[begin:].tolist() == ids and found.mask[begin:].tolist() == learnt(ids, labels)


def test_completion_only_loss_of_trl_on_plain_text(tmp_path):
    ours, oracle = both(tmp_path, "llama3")
    row = {"prompt": "The sky is", "completion": " blue, mostly."}
    ids, labels = labels_of_trl(oracle, row, tmp_path, completion_only_loss=True)
    found = text_tokens(ours, row["prompt"], row["completion"])
    begin = len(found.tokens) - len(ids)
    assert begin in (0, 1) and found.tokens[begin:].tolist() == ids
    assert found.mask[begin:].tolist() == learnt(ids, labels)
