"""The engine as a model of lm-evaluation-harness, so that its tasks run unchanged:

    python -m deepseek_jax.evals.harness run --model deepseek_jax --model_args model=FOLDER --tasks gsm8k

The library is asked for when `register` is called; importing this file does not need it.
"""

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.checkpoint.hub import model_folder
from deepseek_jax.compilation_cache import keep_compiled
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling_config import MAX_STOPS, SamplingConfig
from deepseek_jax.generation.text import seeds_for
from deepseek_jax.model.precision import dtype_of
from deepseek_jax.report.progress import Progress
from deepseek_jax.text.tokenizer import Tokenizer

NAME = "deepseek_jax"
_BATCH = 16
_NEW_TOKENS = 256  # of a completion where a task says nothing, as lm-eval's own models have it
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")

Encoded = tuple[Any, list[int], list[int]]


class EngineModel:
    """What lm-evaluation-harness asks of a model, answered by the engine.

    Args:
        model: Hugging Face or converted folder with its tokenizer, or a name on the hub.
        batch_size: sequences at a time; it changes no result, so that "auto" and lm-eval's default of 1 take 16.
        dtype: of weights, activations and cache: auto, float32 or bfloat16.
        max_length: tokens of context; None takes the model's.
        max_gen_toks: new tokens of a completion where a task names no limit.
        seed: of tasks that draw.
        think_end_token: text after which the answer of a thinking model begins; what stands before it is no answer.
        others: what lm-eval hands to every model; only None is taken.

    Source: EleutherAI/lm-evaluation-harness 0.4.13, lm_eval/api/model.py (TemplateLM) and models/huggingface.py.
    Differs: a sequence to score leaves room for one more token in the context, so that those which fill it lose one or
        two at their beginning; further chat templates by name are not chosen from (tests/evals/test_harness_oracle.py).
    """

    backend = "causal"

    def __init__(
        self,
        model: str,
        *,
        batch_size: int | str = "auto",
        dtype: str = "auto",
        max_length: int | None = None,
        max_gen_toks: int = _NEW_TOKENS,
        seed: int = 0,
        think_end_token: str | None = None,
        **others: Any,
    ):
        super().__init__()
        for name, value in others.items():
            if value is not None:
                raise ValueError(
                    f"{name}: got {value!r}, wanted none; the model's arguments are model, batch_size, dtype, "
                    "max_length, max_gen_toks, seed and think_end_token"
                )
        folder = model_folder(model)
        self.tokenizer = Tokenizer.from_folder(folder)
        loaded = load_model(folder, dtype=dtype_of(dtype))
        self._name, self._weights, self._seed = str(model), loaded.weights, int(seed)
        self._generator = Generator(loaded.config, loaded.graphdef)
        self.batch_size = _slots(batch_size)
        context = loaded.config.max_position_embeddings
        self.max_length = context if max_length is None else int(max_length)
        if not 2 < self.max_length <= context:
            raise ValueError(f"max_length: got {max_length}, wanted 3 to {context}, the model's context")
        self.max_gen_toks, self._think_end = int(max_gen_toks), think_end_token

    # --- text ---------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        if not self.tokenizer.eos_ids:
            raise ValueError(f"{self._name}: names no end-of-sequence token, wanted one in its tokenizer_config.json")
        ids = self.tokenizer.encode(self.tokenizer.eos, add_bos=False) if self.tokenizer.eos else []
        return ids[0] if len(ids) == 1 else self.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
        """Token ids, with one BOS where the model wants one and nothing else is said."""
        return self.tokenizer.encode(string, add_bos=add_special_tokens is not False)

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the checkpoint's template, by which lm-eval tells results apart."""
        if chat_template is False or chat_template is None:
            return None
        return self.tokenizer.chat_template or self.tokenizer.chat_encoding

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without `add_generation_prompt` it ends within its last turn, to be gone on with."""
        text = self.tokenizer.render(list(chat_history), add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        start = text.rfind(last.strip())
        if start < 0:
            raise ValueError("chat template: got a text without its last turn, wanted one to go on with")
        whole = text[start : start + len(last.lstrip())] == last.lstrip()
        return text[: start + len(last.lstrip() if whole else last.strip())]

    # --- what it says of text ------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **others: Any) -> list[tuple[float, bool]]:
        """Of each continuation the log-prob in nats, and whether it is what greedy decoding gives."""
        if not requests:
            return []
        sequences = [(context + continuation)[1 - self.max_length :] for _, context, continuation in requests]
        found: dict[int, tuple[float, bool]] = {}
        with Progress(len(requests), "log-likelihoods") as progress:
            for number, scores in self._generator.scores(self._weights, sequences, slots=self.batch_size):
                asked, context, continuation = requests[number]
                if not 0 < len(continuation) < len(sequences[number]):
                    raise ValueError(
                        f"continuation: got {len(continuation)} tokens, wanted 1 to {self.max_length - 2}, so that the "
                        "context has room for it; choose a shorter one"
                    )
                count = len(continuation)
                found[number] = float(scores.logprobs[-count:].sum()), bool(scores.best[-count:].all())
                if asked is not None:
                    self.cache_hook.add_partial("loglikelihood", asked, found[number])
                progress.advance(1)
        return [found[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probs of whole texts, in nats; one longer than the context in windows, each token predicted once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[Encoded] = []
        owners = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 2, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # --- what it writes ------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Completions, up to a task's stop texts; those that are drawn alike are drawn together."""
        from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

        seeds = self._seeds([request.args[0] for request in requests])
        kinds: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(number)
        found: dict[int, str] = {}
        with Progress(len(requests), "completions") as progress:
            for numbers in kinds.values():
                wanted = dict(normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks))
                stops = [text for text in wanted.pop("until") if text]
                sampling = self._sampling(wanted, stops)
                room = self.max_length - sampling.max_new_tokens
                if room < 1:
                    raise ValueError(
                        f"max_gen_toks: got {sampling.max_new_tokens}, wanted fewer than the context of "
                        f"{self.max_length} tokens; lower it by --gen_kwargs max_gen_toks=N"
                    )
                prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
                of_these = [seeds[number] for number in numbers]
                given = {"seeds": of_these, "tokenizer": self.tokenizer, "slots": self.batch_size}
                for place, completion in self._generator.each(self._weights, prompts, sampling, **given):
                    number = numbers[place]
                    found[number] = postprocess_generated_text(completion.text or "", stops, self._think_end)
                    self.cache_hook.add_partial("generate_until", requests[number].args, found[number])
                    progress.advance(1)
        return [found[number] for number in range(len(requests))]

    def _sampling(self, wanted: dict[str, Any], stops: Sequence[str]) -> SamplingConfig:
        """A task's settings as the engine's. Stop texts of a thinking model count in its answer alone."""
        limit, draws = int(wanted.pop("max_gen_toks")), wanted.pop("do_sample")
        given = {name: wanted.pop(name) for name in _SAMPLING if name in wanted}
        if wanted:
            raise ValueError(
                f"{next(iter(wanted))}: got it in a task's generation_kwargs, wanted until, max_gen_toks, do_sample, "
                f"{', '.join(_SAMPLING)}; set others aside by --gen_kwargs"
            )
        if not draws:
            given = {name: value for name, value in given.items() if name.endswith("penalty")} | {"temperature": 0.0}
        ends = () if self._think_end is not None else tuple(stops[:MAX_STOPS])
        return SamplingConfig(max_new_tokens=limit, stop_ids=self.tokenizer.eos_ids, stop=ends, **given)

    def _seeds(self, contexts: Iterable[str]) -> list[int]:
        """A function of the text and of how often it was asked before."""
        seen: Counter[str] = Counter()
        seeds = []
        for context in contexts:
            seeds += seeds_for(self._seed, zlib.crc32(context.encode("utf-8", "replace")), seen[context], count=1)
            seen[context] += 1
        return seeds


def _slots(batch_size: int | str) -> int:
    text = str(batch_size).partition(":")[0]
    if text != "auto" and not (text.isdecimal() and int(text) >= 1):
        raise ValueError(f"batch_size: got {batch_size!r}, wanted auto, or 1 or more")
    return _BATCH if text in ("auto", "1") else int(text)


@cache
def register() -> type:
    """Makes the model known to lm-evaluation-harness under the name deepseek_jax; its class.

    Raises:
        ValueError: the library is not installed.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("lm_eval: is not installed, wanted 0.4.13 or later: pip install 'deepseek_jax[harness]'")
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model

    return register_model(NAME)(type("EngineLM", (EngineModel, TemplateLM), {}))


def main() -> None:
    """lm-evaluation-harness' own command line, with this model in it."""
    register()
    keep_compiled()  # every call has an engine of its own, with the same programs
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
