"""/v1/completions: texts and tokens gone on with, echoed and scored."""

import pytest

from tests.serve.client import Scripted, run, tokenizer


def engine(answer="abc", **settings) -> Scripted:
    return Scripted(tokenizer(), answer, **settings)


def ask(body, of=None, **settings):
    return run(lambda client: client.ask("/v1/completions", body), of or engine(), **settings)


def test_a_text_is_gone_on_with():
    of = engine()
    found = ask({"prompt": "xy", "model": "tiny", "seed": 3}, of).json
    assert found["object"] == "text_completion" and found["choices"] == [
        {"index": 0, "text": "abc", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    drafts = {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
    assert found["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "completion_tokens_details": drafts,
    }
    assert of.added[0].tokens == of.tokenizer.encode("xy", add_bos=True) and of.added[0].sampling.max_new_tokens == 16


@pytest.mark.parametrize("prompt", ["xy", ["xy", "z"], [5, 6], [[5, 6], [7]]])
def test_prompts_of_every_form(prompt):
    of = engine()
    found = ask({"prompt": prompt, "n": 2, "seed": 1}, of).json
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    count = len(prompt) if several else 1
    assert [choice["index"] for choice in found["choices"]] == list(range(2 * count))
    assert [each.seed for each in of.added] == [1 + n for n in range(2 * count)]
    tokens = [each.tokens for each in of.added]
    assert tokens[0] == tokens[1] and (not several or tokens[2] != tokens[0])
    assert found["usage"]["prompt_tokens"] == sum(map(len, tokens[::2]))


def test_an_echo_with_logprobs_is_what_scores_are_read_from():
    """As lm-eval's local-completions asks: tokens of the prompt, one drawn, all log-probs."""
    of = engine()
    body = {"prompt": [20, 21, 22], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1}
    (choice,) = ask(body, of).json["choices"]
    texts = [of.tokenizer.decode([token]) for token in (20, 21, 22)]
    assert choice["text"] == "".join(texts) + "a" and choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [*texts, "a"] and logprobs["token_logprobs"] == [None, -0.25, -0.25, -0.5]
    assert logprobs["top_logprobs"] == [None, {texts[1]: -0.25}, {texts[2]: -0.25}, {"a": -0.5}]
    assert logprobs["text_offset"] == [0, 1, 2, 3] and of.added[0].sampling.prompt_logprobs


def test_a_prompt_is_scored_alone():
    (choice,) = ask({"prompt": "xy", "max_tokens": 0, "logprobs": 0, "echo": True}).json["choices"]
    assert choice["text"] == "xy" and choice["logprobs"]["tokens"] == ["<bos>", "x", "y"]


def test_a_stream_joins_to_the_whole():
    body = {"prompt": "xy", "logprobs": 1, "echo": True, "seed": 1, "n": 2}
    whole = ask(body).json
    events = ask(body | {"stream": True, "stream_options": {"include_usage": True}}).events
    assert events[-1] == "[DONE]" and events[-2]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [part for event in events[:-2] for part in event["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert sum((part["logprobs"][name] for part in parts if part["logprobs"]), []) == values
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
