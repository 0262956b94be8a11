"""Settings of a request: what contradicts itself or the model is refused in one line, before anything runs."""

import dataclasses

import pytest

from deepseek_jax.generation.sampling_config import SamplingConfig, refuse_unreplayable

BAD = [
    ({"max_new_tokens": 0}, "max_new_tokens: got 0, wanted at least 1"),
    ({"max_new_tokens": "8"}, "max_new_tokens: got '8'"),
    ({"max_new_tokens": True}, "max_new_tokens: got True"),
    ({"temperature": -0.1}, "temperature: got -0.1"),
    ({"temperature": float("nan")}, "temperature: got nan"),
    ({"temperature": float("inf")}, "temperature: got inf"),
    ({"temperature": 1e-30}, "temperature: got 1e-30, wanted 0 (the best token), or 1e-5 or more"),
    ({"temperature": "hot"}, "temperature: got 'hot'"),
    ({"top_p": 0.0}, "top_p: got 0.0"),
    ({"top_p": 1.01}, "top_p: got 1.01"),
    ({"top_k": -1}, "top_k: got -1"),
    ({"top_k": 2.5}, "top_k: got 2.5"),
    ({"min_p": 1.1}, "min_p: got 1.1"),
    ({"repetition_penalty": 0.0}, "repetition_penalty: got 0.0"),
    ({"presence_penalty": 2.1}, "presence_penalty: got 2.1, wanted -2 to 2"),
    ({"frequency_penalty": float("nan")}, "frequency_penalty: got nan"),
    ({"logit_bias": {5: float("inf")}}, "logit_bias: got {5: inf}"),
    ({"logit_bias": {"5": 1.0}}, "logit_bias: got {'5': 1.0}"),
    ({"logit_bias": {-5: 1.0}}, "logit_bias: got {-5: 1.0}"),
    ({"logit_bias": [1.0]}, "logit_bias: got [1.0]"),
    ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "logit_bias: got 301 entries, wanted at most 300 token ids"),
    ({"stop_ids": tuple(range(65))}, "stop_ids: got 65 entries, wanted at most 64 token ids"),
    ({"stop_ids": (-1,)}, "stop_ids: got (-1,)"),
    ({"stop_ids": 3}, "stop_ids: got 3"),
    ({"stop": ""}, "stop: got ('',), wanted a text or a list of at most 16 texts, none of them empty"),
    ({"stop": ["a"] * 17}, "stop: got 17 entries"),
    ({"stop": ["a", ""]}, "stop: got ['a', '']"),
    ({"stop": ["a", 3]}, "stop: got ['a', 3]"),
    ({"stop": 7}, "stop: got 7"),
    ({"stop": None}, "stop: got None"),
    ({"stop": b"end"}, "stop: got b'end'"),
    ({"min_new_tokens": -1}, "min_new_tokens: got -1"),
    ({"min_new_tokens": 5}, "min_new_tokens: got 5, wanted at most max_new_tokens, 4; lower it"),
    ({"top_logprobs": 21}, "top_logprobs: got 21, wanted 0 to 20"),
    ({"prompt_logprobs": 1}, "prompt_logprobs: got 1"),
    ({"thinking_budget": -1}, "thinking_budget: got -1"),
    ({"thinking_budget": 1.5}, "thinking_budget: got 1.5"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_bad_settings_are_refused_by_name_in_one_line(bad, message):
    with pytest.raises(ValueError) as problem:
        SamplingConfig(**{"max_new_tokens": 4, **bad})
    assert str(problem.value).startswith(message) and "\n" not in str(problem.value)


def test_one_stop_text_is_a_list_of_one():
    assert SamplingConfig(max_new_tokens=1, stop="end").stop == ("end",)
    assert SamplingConfig(max_new_tokens=1, stop=["end", "\n"]).stop == ("end", "\n")


def test_a_request_keeps_its_own_bias():
    bias = {3: 1.0}
    config = SamplingConfig(max_new_tokens=1, logit_bias=bias)
    bias[4] = 2.0
    assert config.logit_bias == {3: 1.0} and hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(("prompt", "wanted"), [(1, 9), (31, 9), (32, 8), (36, 4)])
def test_the_context_limits_a_completion(prompt, wanted):
    assert SamplingConfig(max_new_tokens=9, min_new_tokens=4).limit(prompt, 40) == wanted


@pytest.mark.parametrize(
    ("least", "prompt", "message"),
    [
        (0, 40, "prompt: got 40 tokens, wanted at most 39, so that 1 new ones have room in the model's context of 40"),
        (0, 99, "prompt: got 99 tokens, wanted at most 39"),
        (4, 37, "prompt: got 37 tokens, wanted at most 36, so that 4 new ones have room"),
    ],
)
def test_a_prompt_that_leaves_too_little_room_is_refused(least, prompt, message):
    with pytest.raises(ValueError) as problem:
        SamplingConfig(max_new_tokens=9, min_new_tokens=least).limit(prompt, 40)
    assert str(problem.value).startswith(message) and "\n" not in str(problem.value)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"logit_bias": {3: 1.0}}, {"presence_penalty": 1.0}, {"frequency_penalty": 1.0}]
)
def test_a_support_that_no_trainer_can_replay_is_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"^record: got support beside {name}"):
        refuse_unreplayable(SamplingConfig(max_new_tokens=1, **settings))
    refuse_unreplayable(SamplingConfig(max_new_tokens=4, repetition_penalty=1.2, top_k=3, min_new_tokens=2))
