"""lm-evaluation-harness with our engine beside its own transformers model: same log-likelihoods, same completions."""

import json
import os
from importlib.util import find_spec

import pytest

pytestmark = [pytest.mark.oracle]
FOLDER = os.environ.get("SMOLLM2")
ROWS = [
    ("Natalia sold 48 clips in April and half as many in May. How many clips did she sell?", ["72", "96", "24"], 0),
    ("A robe takes 2 bolts of blue fibre and half that much white fibre. How many bolts in total?", ["4", "3", "2"], 1),
    ("The capital of France is", ["Berlin", "Madrid", "Paris", "Rome"], 2),
    ("Water at sea level boils at", ["100 degrees Celsius", "50 degrees Celsius"], 0),
    ("In the sentence 'The cat sat on the mat', the verb is", ["cat", "sat", "mat", "on"], 1),
    ("Wie viele Beine hat eine Spinne?", ["sechs", "acht", "zehn"], 1),
]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
CHOICE = """
task: choice_local
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}]
"""
WRITING = """
task: writing_local
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["Question:", "\\n\\n"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
task: rolling_local
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Both models' answers to three local tasks, plain and in the chat template, and their templates."""
    if find_spec("lm_eval") is None or FOLDER is None:
        pytest.skip("needs lm_eval, and SmolLM2's folder in SMOLLM2")
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from deepseek_jax.evals.harness import register

    folder = tmp_path_factory.mktemp("tasks")
    text = " ".join(question for question, _, _ in ROWS)
    rows = [
        {"question": q, "choices": [f" {choice}" for choice in choices], "gold": gold, "text": text * (3 * n + 1)}
        for n, (q, choices, gold) in enumerate(ROWS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, task in enumerate((CHOICE, WRITING, ROLLING)):
        (folder / f"{number}.yaml").write_text(COMMON.format(file=folder / "rows.jsonl") + task)
    torch.set_num_threads(1)
    window = {"max_length": 258}  # some of the texts are longer: they take several windows
    models = {  # in float32 theirs is 4e-3 nats away from its own float64 on the longest text
        "theirs": HFLM(pretrained=FOLDER, dtype="float64", device="cpu", batch_size=4, max_length=256),
        "ours": register()(FOLDER, dtype="float32", batch_size=4, **window),
    }
    names = ["choice_local", "writing_local", "rolling_local"]
    results = {("template", who): model.chat_template(True) for who, model in models.items()}
    for who, model in models.items():
        for chat in (False, True):
            results[who, chat] = lm_eval.simple_evaluate(
                model,
                tasks=names[: 2 if chat else 3],
                apply_chat_template=chat,
                task_manager=TaskManager(include_path=str(folder), include_defaults=False),
                log_samples=True,
                bootstrap_iters=0,
            )
    return results


def answers(results, name):
    return [sample["resps"] for sample in results["samples"][name]]


@pytest.mark.parametrize("chat", [False, True])
def test_log_likelihoods_equal_to_a_thousandth(found, chat: bool):
    ours, theirs = (answers(found[who, chat], "choice_local") for who in ("ours", "theirs"))
    pairs = [(a, b) for of, other in zip(ours, theirs, strict=True) for a, b in zip(of, other, strict=True)]
    assert len(pairs) == sum(len(choices) for _, choices, _ in ROWS)
    worst = max(abs(float(a[0][0]) - float(b[0][0])) for a, b in pairs)
    assert worst < 1e-3
    assert [a[0][1] for a, _ in pairs] == [b[0][1] for _, b in pairs]
    of = lambda who: found[who, chat]["results"]["choice_local"]["acc,none"]
    assert of("ours") == of("theirs")


@pytest.mark.parametrize("chat", [False, True])
def test_completions_are_equal(found, chat: bool):
    ours, theirs = (answers(found[who, chat], "writing_local") for who in ("ours", "theirs"))
    assert ours == theirs and len({str(of) for of in ours}) == len(ROWS)


def test_rolling_log_likelihoods_are_equal(found):
    ours, theirs = (answers(found[who, False], "rolling_local") for who in ("ours", "theirs"))
    for a, b in zip(ours, theirs, strict=True):
        assert float(a[0][0]) == pytest.approx(float(b[0][0]), rel=1e-6, abs=1e-3)


def test_the_template_is_told_and_both_write_the_same_prompts(found):
    of = lambda who, name: [sample["arguments"] for sample in found[who, True]["samples"][name]]
    for name in ("choice_local", "writing_local"):
        assert of("ours", name) == of("theirs", name)
    assert found["template", "ours"] == found["template", "theirs"] != ""
