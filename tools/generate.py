"""Complete a prompt with a model: a Hugging Face folder or a converted one."""

if __name__ == "__main__":
    from deepseek_jax.interrupt import end_at_once

    end_at_once()

import sys
import time
from pathlib import Path

from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.cli import run
from deepseek_jax.generate.engine import Generator, SamplingConfig
from deepseek_jax.generate.text import complete
from deepseek_jax.processes import printable, say
from deepseek_jax.text.tokenizer import Tokenizer


def main(
    model: Path,
    /,
    *,
    prompt: str,
    max_tokens: int = 256,
    temperature: float = 0.6,
    top_p: float = 0.95,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    chat: bool = True,
    thinking: bool | None = None,
    samples: int = 1,
) -> None:
    """Complete PROMPT with MODEL; text goes to stdout, tokens a second to stderr.

    Args:
        model: Hugging Face or converted folder, with its tokenizer.
        prompt: the text, or the user's turn of a chat.
        max_tokens: limit of new tokens, thinking included.
        temperature: 0 takes the best token each time (DeepSeek-R1: 0.6).
        top_p: sample among the smallest set of tokens that reaches this probability (DeepSeek-R1: 0.95).
        top_k: sample among the k best; 0 is no limit.
        repetition_penalty: divides the odds of tokens seen before; 1 is none.
        seed: the same seed draws the same tokens.
        chat: put the prompt into the checkpoint's chat template; base models, which have none, want --no-chat.
        thinking: the template's switch of that name (DeepSeek-V3.1, V3.2); None leaves it to the template.
        samples: completions to draw.
    """
    if samples < 1:
        raise ValueError(f"samples: got {samples}, wanted at least 1")
    tokenizer = Tokenizer.from_folder(model)
    tokens = _encode(tokenizer, prompt, chat, thinking)
    if not tokenizer.eos_ids:
        say(f"{model}: names no end-of-sequence token; sampling ends at --max-tokens alone", kind="warning")
    sampling = SamplingConfig(
        max_new_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        stop_ids=tokenizer.eos_ids,
    )
    config, graphdef, weights = load_model(model)
    if max(tokens, default=0) >= config.vocab_size:
        raise ValueError(
            f"{model}: the tokenizer gives the prompt the id {max(tokens)}, wanted ids below the model's vocab_size"
            f" {config.vocab_size}; take both from the same checkpoint"
        )
    generator = Generator(config, graphdef)
    start = time.perf_counter()
    seeds = range(seed, seed + samples)
    found = complete(generator, weights, tokenizer, [tokens], sampling, seeds=seeds, samples=samples)
    seconds = time.perf_counter() - start
    for completion in found:
        # a terminal would obey what a model writes; a file or a pipe is to get it unchanged
        print(printable(completion.text) if sys.stdout.isatty() else completion.text)
    count = sum(len(c.tokens) for c in found)
    print(f"{count} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)


def _encode(tokenizer: Tokenizer, prompt: str, chat: bool, thinking: bool | None) -> list[int]:
    switches = {} if thinking is None else {"thinking": thinking}
    if chat:
        return tokenizer.chat([{"role": "user", "content": prompt}], **switches)
    if switches:
        raise ValueError("--thinking: got it with --no-chat, wanted a chat, whose template it is for; leave one out")
    return tokenizer.encode(prompt, add_bos=True)


if __name__ == "__main__":
    run(main)
