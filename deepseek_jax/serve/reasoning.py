"""/v1/reasoning: a question of a domain, answered after a thought, with its steps and a confidence."""

import math
import re
from collections import Counter

from fastapi import APIRouter, Request

from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.serve.answers import Choice, whole_texts
from deepseek_jax.serve.calls import Served, first_seed, new_id
from deepseek_jax.serve.documents import REFUSALS
from deepseek_jax.serve.engine_thread import Wanted
from deepseek_jax.serve.errors import ApiError, of_field
from deepseek_jax.serve.prompts import Prompt
from deepseek_jax.serve.replies import JsonReply
from deepseek_jax.serve.sampling import NAMES
from deepseek_jax.serve.schemas import ReasoningBody, ReasoningReply
from deepseek_jax.text.answers import extract_answer, extract_lenient

router = APIRouter()
TEMPLATES = {
    "general": "{}",
    "math": "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
    "code": "{}\nThink the approach through first, then give the whole program in one fenced code block.",
    "science": "{}\nName the principles you use, reason step by step with units, and end with the final answer.",
}
"""What a domain makes of a question."""
_ANSWER = 1024  # tokens that are kept for the answer at most; at least a quarter of all, where that is fewer
_FRAGMENT = 10  # characters: a shorter beginning of a sentence at a cut end is dropped
_SENTENCE = re.compile(r"[.!?…。！？](?:\s|$)|\n")


@router.post("/v1/reasoning", response_model=ReasoningReply, responses=REFUSALS)
async def reasoning(body: ReasoningBody, request: Request) -> JsonReply:
    """Answer a question after a thought."""
    served: Served = request.app.state.served
    model = served.name(body.model)
    prompt, wanted = await _wanted(served, body)
    call = await served.begin(wanted, request.scope)
    try:
        choices = [Choice(served.prompts, opened=prompt.opened) for _ in wanted]
        texts = await whole_texts(call, choices)
    finally:
        call.end()
    answers = [final_answer(text, body.domain) for _, text in texts]
    (common, votes), *_ = Counter(answers).most_common(1)
    first = answers.index(common)
    choice, (thought, answer) = choices[first], texts[first]
    agreement = votes / len(answers) if len(answers) > 1 else None
    found = ReasoningReply(
        response=_whole_sentences(answer) if choice.finish_reason == "length" else answer.strip(),
        thinking_tokens=choice.thought_tokens,
        total_tokens=len(choice.tokens),
        reasoning_steps=steps(thought),
        confidence_score=_confidence(choice) if agreement is None else agreement,
        id=new_id("reasoning"),
        model=model,
        finish_reason=choice.finish_reason,
        agreement=agreement,
    )
    return JsonReply(found.model_dump())


async def _wanted(served: Served, body: ReasoningBody) -> tuple[Prompt, list[Wanted]]:
    """The prompt, and the completions that are asked for; their thoughts leave room for an answer."""
    if body.samples > served.settings.max_n:
        raise ApiError(400, f"samples: got {body.samples}, wanted at most {served.settings.max_n}", param="samples")
    turns = [{"role": "user", "content": TEMPLATES[body.domain].format(body.prompt)}]
    try:
        prompt = await served.prompts.run(served.prompts.chat, turns, True if body.enforce_thinking else None)
    except ValueError as problem:
        raise ApiError(400, str(problem), param="prompt") from None
    most = min(body.max_tokens, max(2, served.context - len(prompt.tokens)))
    try:
        sampling = SamplingConfig(
            max_new_tokens=most,
            temperature=body.temperature,
            top_p=body.top_p,
            stop_ids=served.eos_ids,
            thinking_budget=most - max(1, min(_ANSWER, most // 4)),
        )
    except ValueError as problem:
        raise of_field(problem, NAMES) from None
    seed = first_seed(body.seed)
    return prompt, [Wanted(prompt.tokens, sampling, seed + number) for number in range(body.samples)]


def steps(thought: str) -> list[str]:
    r"""The paragraphs of a thought, or its lines where it is one paragraph.

    >>> steps("First a.\n\nThen b.\n")
    ['First a.', 'Then b.']
    >>> steps("First a.\nThen b.")
    ['First a.', 'Then b.']
    """
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", thought) if part.strip()]
    if len(paragraphs) == 1:
        paragraphs = [line.strip() for line in thought.splitlines() if line.strip()]
    return paragraphs


def final_answer(answer: str, domain: str) -> str:
    """What samples are compared by."""
    found = extract_lenient(answer) if domain in ("math", "science") else extract_answer(answer)
    return " ".join((answer if found is None else found).split()).casefold()


def _confidence(choice: Choice) -> float:
    """The mean probability of its tokens at the temperature that they were drawn with, those of the thought among them:
    what follows from a thought is nearly certain, right or wrong (docs/benchmarks.md)."""
    logprobs = choice.live.logprobs[: len(choice.tokens)]
    return min(1.0, sum(map(math.exp, logprobs)) / len(logprobs)) if logprobs else 0.0


def _whole_sentences(answer: str) -> str:
    """A cut answer without the few characters of a sentence that it had just begun."""
    ends = [found.end() for found in _SENTENCE.finditer(answer)]
    if ends and len(answer[ends[-1] :].strip()) < _FRAGMENT:
        answer = answer[: ends[-1]]
    return answer.strip()
