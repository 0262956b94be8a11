"""Complete a prompt with a model: a Hugging Face folder or a converted one."""

import sys
import time
from pathlib import Path

import jax

from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.checkpoint.model_folder import load_config
from deepseek_jax.distributed import printable, say
from deepseek_jax.generation.engine import Generator, SamplingConfig
from deepseek_jax.generation.text import complete
from deepseek_jax.model.precision import Precision, dtype_of
from deepseek_jax.model.transfer import serving_layout
from deepseek_jax.sharding import LOCAL, Layout, lanes_of, make_mesh
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
    dtype: Precision = "auto",
    serve_expert: int | None = None,
    serve_tensor: int | None = None,
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
        dtype: of weights, activations and cache; auto is bfloat16 on accelerators and float32 on the CPU.
        serve_expert: divide the model over all devices: groups that whole experts are divided between, with
            serve_tensor. Where one of the two is given, the other is chosen to suit the model; what is left of the
            devices are replicas. Without both the model is on one device.
        serve_tensor: parts of heads, inner widths and vocabulary.
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
    layout = _layout(model, serve_expert, serve_tensor)
    config, graphdef, weights = load_model(model, dtype=dtype_of(dtype), layout=layout)
    if max(tokens, default=0) >= config.vocab_size:
        raise ValueError(
            f"{model}: the tokenizer gives the prompt the id {max(tokens)}, wanted ids below the model's vocab_size"
            f" {config.vocab_size}; take both from the same checkpoint"
        )
    generator = Generator(config, graphdef, layout=layout)
    start = time.perf_counter()
    seeds = range(seed, seed + samples)
    found = complete(generator, weights, tokenizer, [tokens], sampling, seeds=seeds, samples=samples)
    seconds = time.perf_counter() - start
    for completion in found:
        # a terminal would obey what a model writes; a file or a pipe is to get it unchanged
        print(printable(completion.text) if sys.stdout.isatty() else completion.text)
    count = sum(len(c.tokens) for c in found)
    print(f"{count} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)


def _layout(model: Path, expert: int | None, tensor: int | None) -> Layout:
    if expert is None and tensor is None:
        return LOCAL
    every = Layout(mesh=make_mesh(data=jax.device_count()), lanes=lanes_of(jax.default_backend()))
    return serving_layout(load_config(model), every, expert=expert, tensor=tensor)


def _encode(tokenizer: Tokenizer, prompt: str, chat: bool, thinking: bool | None) -> list[int]:
    switches = {} if thinking is None else {"thinking": thinking}
    if chat:
        return tokenizer.chat([{"role": "user", "content": prompt}], **switches)
    if switches:
        raise ValueError("--thinking: got it with --no-chat, wanted a chat, whose template it is for; leave one out")
    return tokenizer.encode(prompt, add_bos=True)
