"""R1: does the whole recipe teach a small model to reason, and which of its stages does?

Without arguments a small DeepSeek-architecture model is made from nothing. It reads equations, alone and in chains (in
the place of pre-training), imitates demonstrations of easy puzzles in two languages of which most only guess (cold
start), is reinforced on harder ones (RL-1), answers them, of which the good answers are kept (rejection sampling),
learns these with general talk from the base on (SFT), and is reinforced again, also by a scorer (RL-2; `--last-stage
distill` distils on-policy instead). After every stage it is scored on held-out puzzles, of which half take more steps
than any demonstration. With `--model`, `--data`, `--held-out` and `--cold-start` the same stages train a checkpoint;
`--preset paper` has R1's numbers, `--set` any other.

Cost: five models of half a million parameters, one after the other: 14 minutes of two cores that do nothing
else. Found: 0 and 11 to 14 % after base and cold start, 36 to 57 % after RL-1, 36 to 64 % at the end (LOG.md, four
seeds). A killed run goes on when the same command is given again; what is done is not done
again. report.html and summary.json tell of all stages; `tools/report.py RUN` writes them anew.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder, without an install too

from deepseek_jax.__main__ import main

if __name__ == "__main__":
    main("r1")
