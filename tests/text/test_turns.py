"""Which tokens of a conversation are learnt: the assistant's text and the end of its turn, under any template."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.text.turns import chat_tokens, text_tokens
from tests.text.test_tokenizer import FOLDERS, needs_shared

ALPHABET = "abcdefghijklmnopqrstuvwxyzSUA:;[]/ \n!"
# Toy templates: one that opens an answer, one that does not, one that marks, one that drops thoughts.
OPENS = (
    "{{ bos_token }}{% for m in messages %}{{ {'system': 'S', 'user': 'U', 'assistant': 'A'}[m.role] }}:"
    "{{ m.content }}{{ eos_token if m.role == 'assistant' else ';' }}\n{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
NEVER_OPENS = OPENS.replace("{% if add_generation_prompt %}A:{% endif %}", "")
MARKS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{{ '\n' }}{% else %}{{ 'S' if m.role == 'system' else 'U' }}:{{ m.content }};"
    "{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
DROPS = OPENS.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}").replace(
    "A:{% endif", "A:<think>\n{% endif"
)
TEMPLATES = {"opens": OPENS, "never opens": NEVER_OPENS, "marks": MARKS}


def tokenizer(template: str) -> Tokenizer:
    return Tokenizer.characters("".join(dict.fromkeys(ALPHABET)), chat_template=template)


TOKENIZERS = {name: tokenizer(template) for name, template in (TEMPLATES | {"drops": DROPS}).items()}


def learnt(of: Tokenizer, found) -> list[str]:
    """The runs of tokens that are learnt, as text."""
    runs, text = [], ""
    for token, is_learnt in zip(found.tokens.tolist(), found.mask.tolist(), strict=True):
        if is_learnt:
            text += of.decode([token], skip_special=False)
        elif text:
            runs, text = [*runs, text], ""
    return [*runs, text] if text else runs


def message(role: str, content: str, **more: str) -> dict[str, str]:
    return {"role": role, "content": content, **more}


words = st.text(alphabet="abz :;U", min_size=1, max_size=8)
conversations = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), words), min_size=1, max_size=6)


@pytest.mark.parametrize("name", TEMPLATES)
@given(turns=conversations, history=st.integers(0, 3))
def test_exactly_what_the_assistant_says_is_learnt(name, turns, history):
    """Whatever is said: headers' letters and marks among it too."""
    messages = [message(role, content) for role, content in turns]
    wanted = [m["content"] + "<eos>" for m in messages[history:] if m["role"] == "assistant"]
    if name == "marks" and len(wanted) != sum(m["role"] == "assistant" for m in messages):
        wanted = [m["content"] + "<eos>" for m in messages[history:] if m["role"] == "assistant"]
    of = TOKENIZERS[name]
    if not wanted:
        with pytest.raises(ValueError, match="no assistant turn"):
            chat_tokens(of, messages, history=history)
        return
    found = chat_tokens(of, messages, history=history)
    assert learnt(of, found) == wanted
    assert found.tokens.tolist() == of.chat(messages, add_generation_prompt=False)
    assert (found.unlearnt, found.continued) == (0, False)


def test_a_template_that_drops_thoughts_is_answered_behind_its_opening_and_earlier_turns_are_not_learnt():
    of = TOKENIZERS["drops"]
    messages = [
        message("user", "a"),
        message("assistant", "<think>\nb\n</think>\n\nc"),
        message("user", "d"),
        message("assistant", "<think>\ne\n</think>\n\nf"),
    ]
    found = chat_tokens(of, messages)
    text = "<bos>U:a;\nA:\n\nc<eos>\nU:d;\nA:<think>\ne\n</think>\n\nf<eos>"
    assert of.decode(found.tokens.tolist(), skip_special=False) == text
    assert learnt(of, found) == ["e\n</think>\n\nf<eos>"]
    assert (found.unlearnt, found.continued) == (1, True)
    apart = [*messages[:3], message("assistant", "f", reasoning_content="e")]
    np.testing.assert_array_equal(chat_tokens(of, apart).tokens, found.tokens)
    # a turn without thoughts is as the template has it
    plain = chat_tokens(of, [message("user", "a"), message("assistant", "c")])
    assert learnt(of, plain) == ["c<eos>"] and not plain.continued


def test_a_turn_that_later_messages_change_is_not_learnt():
    only_last = OPENS.replace("{{ m.content }}", "{{ m.content if loop.last or m.role != 'assistant' else '..'[:1] }}")
    of = Tokenizer.characters("".join(dict.fromkeys(ALPHABET + ".")), chat_template=only_last)
    found = chat_tokens(of, [message(r, r[0]) for r in ("user", "assistant", "user", "assistant")])
    assert learnt(of, found) == ["a<eos>"] and found.unlearnt == 1
    assert found.mask.nonzero()[0].min() > 10


def test_a_template_that_keeps_nothing_or_refuses_says_so():
    messages = [message("user", "a"), message("assistant", "b")]
    with pytest.raises(ValueError, match="leaves out what the assistant says|keeps no assistant turn"):
        chat_tokens(tokenizer("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"), messages)
    with pytest.raises(ValueError, match="chat template: refused to render: no"):
        chat_tokens(tokenizer("{{ raise_exception('no') }}"), messages)


def test_without_a_template_the_completion_and_an_end_are_learnt():
    of = TOKENIZERS["opens"]
    found = text_tokens(of, "ab", "cd")
    assert of.decode(found.tokens.tolist(), skip_special=False) == "<bos>abcd<eos>"
    assert learnt(of, found) == ["cd<eos>"]


@needs_shared
def test_of_r1s_templates_thoughts_are_learnt_and_headers_are_not():
    of = Tokenizer.from_folder(FOLDERS / "deepseek-r1-distill-qwen-7b")
    messages = [message("user", "1+1?"), message("assistant", "<think>\nTwo.\n</think>\n\n2")]
    found = chat_tokens(of, messages)
    assert learnt(of, found) == ["Two.\n</think>\n\n2<｜end▁of▁sentence｜>"] and found.continued
    begin = of.chat(messages[:1])  # what sampling begins with
    assert found.tokens[: len(begin)].tolist() == begin and not found.mask[: len(begin)].any()
    assert found.mask[len(begin) :].all()
