"""The stages of the recipe: each makes its command's settings, and runs that command on what earlier stages gave."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax import distributed
from deepseek_jax.checkpoint.files import read_json, write_whole
from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.commands import distill, evaluate, rejection, sft, train, train_settings
from deepseek_jax.commands.settings_file import values_of, with_values
from deepseek_jax.commands.toy import small_model
from deepseek_jax.data.puzzle_text import demonstrations, facts, general, general_prompts, puzzle_tokenizer
from deepseek_jax.data.puzzles import draw
from deepseek_jax.data.sources import open_source
from deepseek_jax.evals.samples import json_line
from deepseek_jax.evals.tasks import task_named
from deepseek_jax.rewards.own import own_rewards
from deepseek_jax.sharding import AXES
from deepseek_jax.train.runs import SUMMARY
from deepseek_jax.train.stages import Done, Stage

Given = tuple[str, str] | Path
"""A file: (stage, its name there), or one of the user's."""
EVALUATION = "evaluation"
# Names of a stage's files, and what its outcome does not depend on.
_LEFT_OUT = {"output", "config", "model", "data", "late_data", "held_out", "reward", "quick", "student", "teacher"}
_LEFT_OUT |= {"wandb_project", "wandb_offline", "save_dtype", "remat", "profile_steps"}
_LEFT_OUT |= {"eval_every", "save_every", "samples_every"}
_LEFT_OUT |= {"at_once", "serve_expert", "serve_tensor", "serve_unrolled", "batch", *(f"mesh_{axis}" for axis in AXES)}


class Maker(NamedTuple):
    """Makes stages.

    options: of every stage, by the names of its command's options. held_out: the questions that every model is scored
    on, and benchmark how their rows are read and graded. seed: of everything.
    """

    options: Mapping[str, Mapping[str, Any]]
    held_out: Given
    benchmark: str
    seed: int

    # --- data ------------------------------------------------------------------------------------

    def questions(self, name: str) -> Stage:
        """Puzzles to train on and held-out ones, demonstrations of easy ones, and what the base model has read."""
        options = dict(self.options[name])

        def does(folder: Path, model: Path | None, data: Mapping[str, Path]) -> Done:
            of = lambda part, count, levels: draw(count, part=part, levels=levels, seed=self.seed)
            easy = of("train", options["demonstrations"], options["easy"])
            rows = {
                "train": [p.row() for p in of("train", options["train"], options["train_levels"])],
                "held_out": [p.row() for p in of("held_out", options["held_out"], options["held_out_levels"])],
                "demonstrations": demonstrations(
                    easy, mixed=options["mixed"], guessed=options["guessed"], seed=self.seed
                ),
                "facts": facts(options["facts"], self.seed),
                "general": general(self.seed),
                "general_prompts": general_prompts(),
            }
            files = {of: write_rows(folder / f"{of}.jsonl", found) for of, found in rows.items()}
            return Done(data=files, report={of: len(found) for of, found in rows.items()})

        return Stage(name, does, options | {"seed": self.seed})

    def mixture(self, name: str, *, reasoning: Given, general: Given | None) -> Stage:
        """Reasoning and general conversations in their proportion, shuffled; general ones come again where too few."""
        share = self.options[name]["general_share"] if general is not None else 0.0
        if not 0 <= share < 1:
            raise ValueError(f"{name}.general_share: got {share}, wanted from 0 to below 1")

        def does(folder: Path, model: Path | None, data: Mapping[str, Path]) -> Done:
            thinking, talk = (read_rows(data[of]) if of in data else [] for of in ("reasoning", "general"))
            wanted = round(len(thinking) * share / (1 - share))
            rows = [*thinking, *islice(cycle(talk), wanted)]
            order = np.random.default_rng((self.seed, 0x4D4958)).permutation(len(rows))
            # of a conversation, the messages alone: columns of two sources may differ
            plain = [
                {key: rows[n][key] for key in ("messages", "prompt", "completion") if key in rows[n]} for n in order
            ]
            file = write_rows(folder / "rows.jsonl", plain)
            counts = {"reasoning": len(thinking), "general": wanted, "general different": min(wanted, len(talk))}
            return Done(data={"rows": file}, report=counts)

        return Stage(
            name,
            does,
            {"general_share": share, "seed": self.seed},
            data={"reasoning": reasoning} | ({"general": general} if general is not None else {}),
        )

    def rejection(self, name: str, *, model: str | Path, ask: Given) -> Stage:
        """Samples of every question, and of these the ones worth imitating."""
        given = {"benchmark": self.benchmark, "form": task_named(self.benchmark).form, "seed": self.seed}
        base = with_values(rejection.Config(), given | self.options[name])

        def does(folder: Path, model: Path | None, data: Mapping[str, Path]) -> Done:
            rejection.main(with_values(base, {"output": folder, "model": model, "data": (str(data["ask"]),)}))
            counts = read_json(folder / rejection.COUNTS)
            report = {key: counts[key] for key in ("samples", "kept", "prompts", "prompts_kept", "rejected")}
            return Done(data={"accepted": folder / rejection.ACCEPTED}, report=report)

        return Stage(name, does, _plain(base), model, {"ask": ask})

    # --- models ----------------------------------------------------------------------------------

    def base(self, name: str, *, learn: Given) -> Stage:
        """A small model that has read equations and nothing else: what stands in the place of a pre-trained one."""
        inner = self.sft(name, model=None, learn=learn)

        def does(folder: Path, model: Path | None, data: Mapping[str, Path]) -> Done:
            start = folder / "start"
            if not distributed.on_main(start.exists):
                tokenizer = puzzle_tokenizer()
                save_model(small_model(tokenizer, self.seed), start, tokenizer=tokenizer.files)
            return inner.does(folder, start, data)

        return inner._replace(does=does)

    def sft(self, name: str, *, model: str | Path | None, learn: Given) -> Stage:
        """Supervised fine-tuning, then the accuracy."""
        base = with_values(sft.Config(), {"seed": self.seed, **self.options[name]})

        def does(folder: Path, model: Path | None, data: Mapping[str, Path]) -> Done:
            if not _finished(folder):
                sft.main(with_values(base, {"output": folder, "model": model, "data": (str(data["learn"]),)}))
            return self._scored(folder, data["held_out"])

        return Stage(name, does, _plain(base) | self._scores, model, {"learn": learn, "held_out": self.held_out})

    def rl(
        self,
        name: str,
        *,
        model: str | Path,
        ask: Given,
        late: Given | None = None,
        scorer: str | None = None,
        command: Callable[[train_settings.Config], None] = train.main,
    ) -> Stage:
        """GRPO by rules and, for general talk that joins late, by a scorer, FILE.py:function; then the accuracy. A
        command of another algorithm may stand in for GRPO's."""
        graded = {"accuracy": "task", "tasks": (self.benchmark,), "format": task_named(self.benchmark).form}
        options = {"seed": self.seed, **graded, **self.options[name], "reward": () if scorer is None else (scorer,)}
        if late is None:
            options = {key: of for key, of in options.items() if not key.startswith("late_")}
        names = {"ask": "data", "held_out": "held_out", **({"late": "late_data"} if late is not None else {})}
        valid = with_values(train_settings.Config(), options | {option: (of,) for of, option in names.items()})
        settings = _plain(valid) | {"scorer": [of.digest for of in own_rewards(options["reward"])]}

        def does(folder: Path, model: Path | None, data: Mapping[str, Path]) -> Done:
            given = {option: (str(data[of]),) for of, option in names.items()}
            fitting = train_settings.defaults({"model": str(model), "chat": options.get("chat", True)})
            if not _finished(folder):
                command(with_values(fitting, options | given | {"output": folder, "model": model}))
            return self._scored(folder, data["held_out"])

        files = {"ask": ask, "held_out": self.held_out, "late": late}
        return Stage(name, does, settings | self._scores, model, {of: files[of] for of in names})

    def distill(self, name: str, *, model: str | Path, teachers: Sequence[Given], ask: Given) -> Stage:
        """On-policy distillation from one or several teachers, then the accuracy."""
        base = with_values(distill.Config(), {"seed": self.seed, "loss": "reverse-kl", **self.options[name]})

        def does(folder: Path, model: Path | None, data: Mapping[str, Path]) -> Done:
            taught_by = tuple(str(data[f"teacher {number}"]) for number in range(len(teachers)))
            given = {"output": folder, "student": model, "teacher": taught_by, "data": (str(data["ask"]),)}
            if not _finished(folder):
                distill.main(with_values(base, given))
            return self._scored(folder, data["held_out"])

        files = {"ask": ask, "held_out": self.held_out}
        files |= {f"teacher {number}": teacher for number, teacher in enumerate(teachers)}
        return Stage(name, does, _plain(base) | self._scores, model, files)

    @property
    def _scores(self) -> dict[str, Any]:
        """What the accuracy depends on."""
        return {f"evaluation {key}": of for key, of in self.options[EVALUATION].items() if key not in _LEFT_OUT}

    def _scored(self, folder: Path, held_out: Path) -> Done:
        """The model that a stage wrote, with its accuracy."""
        given = {"benchmark": self.benchmark, "model": folder / "model", "output": folder / EVALUATION}
        options = {"seed": self.seed, **self.options[EVALUATION], **given, "data": (str(held_out),)}
        evaluate.main(with_values(evaluate.Config(), options))
        found = read_json(folder / EVALUATION / evaluate.SUMMARY)[self.benchmark]
        report = {"accuracy": found["pass@1"], "stderr": found["stderr"], "questions": found["n"]}
        return Done(model=folder / "model", report=report | {"samples": found["samples"]})


def _plain(config: Any) -> dict[str, Any]:
    """The settings that an outcome depends on, as JSON has them."""
    flat = json.loads(json.dumps(values_of(config), default=str))
    return {name: value for name, value in flat.items() if name not in _LEFT_OUT}


def _finished(folder: Path) -> bool:
    return distributed.on_main((folder / SUMMARY).exists)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file or folder of data."""
    source = open_source(str(path))
    return [source[number] for number in range(len(source))]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """JSON Lines, whole or not at all."""
    text = b"".join(map(json_line, rows))
    distributed.on_main(lambda: write_whole(path, text))
    return path
