"""Clients that nobody here wrote: openai, schemathesis, lm-eval's local-completions."""

import asyncio
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.serve.test_process import Server

pytestmark = pytest.mark.oracle
KEY = "sk-tests-only"


@pytest.fixture(scope="module")
def server(model_folder):
    few = ["--port", "0", "--max-num-seqs", "4", "--max-model-len", "192", "--max-num-batched-tokens", "64"]
    with Server(model_folder, *few, "--rate-limit", "None", "--api-key", KEY) as started:
        started.until(lambda: any("ready when" in line for line in started.said))
        started.until(lambda: started.ask("GET", "/ready").status == 200)
        yield started


def needs(name: str) -> None:
    if find_spec(name) is None:
        pytest.skip(f"needs {name}: pip install -e '.[oracle]'")


def test_openai_whole_streamed_scored_and_structured(server):
    needs("openai")
    import openai
    import pydantic

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY)
    assert [model.id for model in client.models.list()] == ["tiny"]
    turns = [{"role": "user", "content": "17+25=?"}]
    asked = {"model": "tiny", "messages": turns, "seed": 3, "max_tokens": 40}
    whole = client.chat.completions.create(**asked, n=2, logprobs=True, top_logprobs=2)
    assert len(whole.choices) == 2 and whole.usage.completion_tokens <= 80
    assert len(whole.choices[0].logprobs.content[0].top_logprobs if whole.choices[0].logprobs.content else "12") == 2
    thought, answer, usage = "", "", None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            thought += getattr(choice.delta, "reasoning_content", None) or ""
            answer += choice.delta.content or ""
    message = whole.choices[0].message
    assert (thought or None, answer) == (message.reasoning_content, message.content)
    assert usage.completion_tokens_details.reasoning_tokens <= usage.completion_tokens

    class Sum(pydantic.BaseModel):
        answer: int
        sure: bool

    more = {"thinking": {"type": "enabled", "budget_tokens": 4}}
    parsed = client.chat.completions.parse(
        model="tiny",
        messages=turns,
        response_format=Sum,
        extra_body=more,
        logit_bias={"2": -30},
        max_completion_tokens=120,
        seed=1,
    )
    if parsed.choices[0].finish_reason == "stop":
        assert isinstance(parsed.choices[0].message.parsed, Sum)
    text = client.completions.create(model="tiny", prompt="1+1", max_tokens=3, echo=True, logprobs=1)
    assert text.choices[0].text.startswith("1+1") and text.choices[0].logprobs.token_logprobs[0] is None


def test_openai_async_many_at_a_time_and_its_errors(server):
    needs("openai")
    import openai

    async def main():
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY) as client:
            turns = lambda number: [{"role": "user", "content": f"{number}"}]
            ask = lambda number: client.chat.completions.create(
                model="tiny", messages=turns(number % 4), max_tokens=10, seed=number % 4
            )
            found = await asyncio.gather(*map(ask, range(12)))
            texts = [answer.choices[0].message.model_dump() for answer in found]
            assert texts[:4] == texts[4:8] == texts[8:]
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(model="gpt-4", messages=turns(1))
            with pytest.raises(openai.BadRequestError) as bad:
                await client.chat.completions.create(model="tiny", messages=turns(1), temperature=-1)
            assert bad.value.param == "temperature"
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="wrong-key") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()

    asyncio.run(main())


def test_schemathesis_finds_nothing(server, tmp_path):
    """But for refusals of what a schema does not say: fields that contradict each other, the toy's small vocabulary."""
    needs("schemathesis")
    program = Path(sys.executable).with_name("schemathesis")
    command = [program, "run", f"http://127.0.0.1:{server.port}/openapi.json", "--max-examples", "15"]
    command += ["--header", f"Authorization: Bearer {KEY}", "--request-timeout", "60", "--seed", "1"]
    command += ["--exclude-checks", "positive_data_acceptance"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"COLUMNS": "150"})
    assert done.returncode == 0, done.stdout[-6000:]


def test_lm_eval_reads_the_same_scores_as_from_the_engine(server, model_folder, monkeypatch):
    needs("lm_eval")
    needs("tenacity")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from deepseek_jax.evals.harness import EngineModel, register

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    url = f"http://127.0.0.1:{server.port}/v1/completions"
    given = {"model": "tiny", "tokenizer": str(model_folder), "tokenizer_backend": "huggingface"}
    outer = LocalCompletionsAPI(base_url=url, **given, max_length=192, batch_size=2)
    pairs = [("1+1=", "2"), ("17+25=", "42"), ("A robe", " takes 2"), ("x", "yz")]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    found = outer.loglikelihood(asked)
    assert issubclass(register(), EngineModel)
    own = register()(str(model_folder))
    inner = own._loglikelihood_tokens(
        [(None, *outer._encode_pair(*pair)) for pair in pairs]
    )  # the tokens that it sends
    for (outer_value, outer_best), (inner_value, inner_best) in zip(found, inner, strict=True):
        assert outer_value == pytest.approx(inner_value, abs=1e-4) and outer_best == inner_best
    stops = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    written = [Instance("generate_until", {}, (text, stops), number) for number, (text, _) in enumerate(pairs)]
    texts = LocalCompletionsAPI(base_url=url, **given, max_length=192, batch_size=1, tokenized_requests=False)
    assert texts.generate_until(written) == own.generate_until(written)
