"""Rejection sampling: which of a model's own answers are worth imitating?

`--benchmark NAME --data FILE.jsonl` says how rows are read and graded (any benchmark of `evaluate`; `puzzles` for those
of `experiments/r1.py`). Every question gets --samples answers by the engine, or by a server; each is graded, and kept
where it passes the rules, the rules of sense (no false equation, no two answers, an answer that the thought comes to,
no loops, enough samples that agree), language, length, readability and novelty. accepted.jsonl is read by
`experiments/sft.py --data`; rejected.jsonl has every other sample with its reason.

Cost: that of drawing the samples. Expected: every kept answer is right by the grader; the counts of the reasons add up
to the samples. A killed run goes on with the samples that are there; other filters begin from them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder, without an install too

from deepseek_jax.__main__ import main

if __name__ == "__main__":
    main("rejection")
