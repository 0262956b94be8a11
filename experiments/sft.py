"""SFT: does a model learn to say what the assistant says in a file of conversations?

With `--model FOLDER --data FILE.jsonl` a Hugging Face checkpoint learns conversations of any public form (messages,
prompt and completion, ShareGPT's, problem and solution) under its own chat template; what counts is the assistant's
text. It says first how many rows and tokens it learns, and what it leaves out, by reason. Without arguments a small
DeepSeek-architecture model is made from nothing and learns generated conversations.

Cost: without arguments 134 updates of a half-million-parameter model, one to two minutes on two CPU cores.
Expected: the held-out loss falls from that of a guess, about 3.6 nats a token, to less than 0.01. A killed run goes
on from its last checkpoint when the same command is given again, and a finished one when `--steps` or `--epochs` is
raised.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder, without an install too

from deepseek_jax.__main__ import main

if __name__ == "__main__":
    main("sft")
