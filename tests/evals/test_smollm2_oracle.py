"""A real pretrained model on real questions: our verdicts are those of transformers' greedy answers to like prompts.

SMOLLM2 names the model's folder; SMOLLM2_SAMPLES a folder that `deepseek-jax evaluate --temperature 0` wrote, else one
is made of the first SMOLLM2_ROWS rows, 32 by default.
"""

import json
import os
from pathlib import Path

import pytest

from deepseek_jax.data.sources import open_source
from deepseek_jax.evals.graders import Graders
from deepseek_jax.evals.task import Answered
from deepseek_jax.evals.tasks import TASKS

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
FILES = {"gsm8k": "gsm8k/test.jsonl", "svamp": "svamp/test.jsonl"}
BATCH, ROWS, TOKENS = 100, int(os.environ.get("SMOLLM2_ROWS", "32")), 256

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.slow,
    pytest.mark.skipif(not REAL.is_dir(), reason="needs GSM8K and SVAMP beside the repository"),
]


def samples(smollm2, name, tmp_path, command_line):
    """What evaluate found, by problem."""
    written = os.environ.get("SMOLLM2_SAMPLES")
    if written is None:
        from deepseek_jax.commands.evaluate import main

        options = ("--benchmark", name, "--data", REAL / FILES[name], "--limit", ROWS, "--temperature", 0)
        status, _, err = command_line(main)(smollm2, *options, "--max-tokens", TOKENS, "--output", tmp_path / "out")
        assert status == 0, err
        written = tmp_path / "out"
    lines = map(json.loads, (Path(written) / "samples.jsonl").read_text().splitlines())
    return [line for line in lines if line["benchmark"] == name]


@pytest.mark.parametrize("name", FILES)
def test_verdicts_are_those_of_transformers(name, smollm2, tmp_path, command_line):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = samples(smollm2, name, tmp_path, command_line)
    tokenizer = AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    problems = TASKS[name].problems(open_source(str(REAL / FILES[name])), len(ours))
    style = TASKS[name].style("deepseek")
    texts = []
    for start in range(0, len(problems), BATCH):
        chats = [[{"role": "user", "content": style.write(each)}] for each in problems[start : start + BATCH]]
        given = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
        )
        with torch.no_grad():
            found = model.generate(**given, max_new_tokens=TOKENS, do_sample=False)
        texts += tokenizer.batch_decode(found[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    rows = [Answered(problem, style, "", text) for problem, text in zip(problems, texts, strict=True)]
    with Graders() as graders:
        theirs = TASKS[name].grade(rows, graders)
    same = [(a["score"], a["lenient"]) == (b.score, b.lenient) for a, b in zip(ours, theirs, strict=True)]
    equal = [a["completion"] == text for a, text in zip(ours, texts, strict=True)]
    right, lax = (sum(a[of] for a in ours) / len(ours) for of in ("score", "lenient"))
    told = f"strict {right:.3f}, lenient {lax:.3f}; same verdicts {sum(same)}, same texts {sum(equal)}"
    print(f"{name}: {len(ours)} rows, {told}")
    assert sum(same) >= 0.99 * len(same)
