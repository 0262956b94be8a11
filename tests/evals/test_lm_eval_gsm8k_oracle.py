"""lm-evaluation-harness's own gsm8k task through our engine, beside `deepseek-jax evaluate --prompt-style lm-eval`.

SMOLLM2 names the model's folder. Zero-shot, as the style is; the task's file is the harness's, with the data at hand.
"""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"
FOLDER = os.environ.get("SMOLLM2")
ROWS, TOKENS = int(os.environ.get("SMOLLM2_ROWS", "200")), 256  # TOKENS: what the harness's models write at most

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.slow,
    pytest.mark.skipif(not REAL.is_dir(), reason="needs GSM8K beside the repository"),
    pytest.mark.skipif(find_spec("lm_eval") is None or FOLDER is None, reason="needs lm_eval, and SMOLLM2's folder"),
]


def theirs(folder):
    """The harness's samples of its gsm8k task, by row."""
    import lm_eval
    import yaml
    from lm_eval.tasks import TaskManager

    from deepseek_jax.evals.harness import register

    task = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
    files = {"train": str(REAL / "test.jsonl"), "test": str(REAL / "test.jsonl")}  # no example is taken from train
    task |= {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "num_fewshot": 0}
    del task["dataset_name"]
    (folder / "gsm8k.yaml").write_text(yaml.safe_dump(task))
    found = lm_eval.simple_evaluate(
        register()(FOLDER, dtype="float32", batch_size=16),
        tasks=["gsm8k"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        limit=ROWS,
        apply_chat_template=True,  # as `evaluate` asks a chat model
        log_samples=True,
        bootstrap_iters=0,
    )
    rows = {"strict-match": {}, "flexible-extract": {}}
    for sample in found["samples"]["gsm8k"]:
        rows[sample["filter"]][sample["doc_id"]] = sample
    return rows, found["results"]["gsm8k"]


def test_same_completions_and_the_same_figure(tmp_path, command_line):
    from deepseek_jax.commands.evaluate import main

    options = ("--benchmark", "gsm8k", "--data", REAL / "test.jsonl", "--limit", ROWS, "--prompt-style", "lm-eval")
    status, _, err = command_line(main)(
        FOLDER, *options, "--temperature", 0, "--max-tokens", TOKENS, "--dtype", "float32", "--output", tmp_path / "out"
    )
    assert status == 0, err
    ours = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    rows, results = theirs(tmp_path)
    differ = [n for n, line in enumerate(ours) if line["completion"] != rows["strict-match"][n]["resps"][0][0]]
    strict = [n for n, line in enumerate(ours) if line["score"] != rows["strict-match"][n]["exact_match"]]
    lax = [n for n, line in enumerate(ours) if line["lenient"] != rows["flexible-extract"][n]["exact_match"]]
    score, lenient = (sum(line[of] for line in ours) / ROWS for of in ("score", "lenient"))
    their = {of: results[f"exact_match,{of}"] for of in rows}
    print(f"{ROWS} rows: texts that differ {len(differ)}; strict {score:.3f}, lenient {lenient:.3f}; theirs {their}")
    for n in sorted({*differ, *strict, *lax}):
        got = rows["flexible-extract"][n]
        told = {"ours": ours[n]["completion"], "theirs": got["resps"][0][0], "found": got["filtered_resps"]}
        print(json.dumps({"row": n, "lenient": ours[n]["lenient"], **told}, ensure_ascii=False))
    assert len(differ) <= 0.01 * ROWS
    assert set(strict) <= set(differ)
