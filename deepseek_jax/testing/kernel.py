"""What is said of a kernel so that it can be tested, one example of its inputs, and what is wrong with it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hypothesis.strategies import SearchStrategy

from deepseek_jax.testing.draw import NUMBERS, Draw
from deepseek_jax.testing.invariance import Invariance

Sizes = Mapping[str, int | str]
Platform = Literal["any", "tpu", "gpu"]
Bound = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One example, in plain numbers.

    Attributes:
        sizes: what shapes are made of, and anything else that a program is compiled for.
        ragged: integers, or nested lists of them, that vary within a shape.
        dtype: of the arguments that are numbers.
        numbers: what kind of numbers, one of `draw.NUMBERS`.
        seed: of the numbers.
        thorough: whether it is put to the laws too that compile something for every example.
    """

    sizes: dict[str, int | str]
    ragged: dict[str, Any]
    dtype: str = "float32"
    numbers: str = "normal"
    seed: int = 0
    thorough: bool = False

    def as_json(self) -> str:
        """In one line."""
        return json.dumps(asdict(self), separators=(",", ":"))


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A function of arrays, and what holds of it.

    Attributes:
        name: as `deepseek-jax kernels --kernel` takes it.
        run: arguments by name to an array or a tree of arrays. Arguments that are no arrays or trees of them, but
            numbers, texts or None, are static: a program is compiled for each of their values. Of a `platform` it also
            takes `interpret`, which goes to `pallas_call`; with several `devices` it takes those, as `devices`.
        twin: the same in float64, of the same arguments as NumPy arrays: what is a number among them is float64,
            integers stay what they are. With `gradients` it is compiled: written in jax.numpy, and of no value of an
            array does it make a choice in Python. Where its result is NaN, that of the kernel is undefined and not
            looked at.
        inputs: makes the arguments of an example.
        sizes: for each name the values that are tried, the simplest first and the one that is most at the edge last.
            A search tries so many combinations of them, and compiles programs for each. They are of `inputs`, which
            makes shapes and static arguments of them.
        ragged: for each name what is drawn, given the sizes.
        dtypes: that are tried, the simplest first.
        tolerance: by dtype, as a part of the largest magnitude in the twin's result, each array for itself.
        bound: where that says too little: (the dtype's tolerance, arguments as of the twin) to the error that is
            allowed, which broadcasts to the result, or a tuple of these for a tuple of results. `rounding` works one
            out, of a tolerance that is one of its `UNITS`.
        gradients: arguments that have one.
        gradient_tolerance: by dtype, as a part of the largest magnitude of an argument's gradient; None is `tolerance`.
        gradient_noise: by dtype, what is allowed beside: of terms that cancel, their rounding is left.
        gradient_bound: where these say too little: (the dtype's tolerance, the gradient of the result, arguments as of
            the twin) to the error that is allowed in that of each argument, by name.
        dead_gradients: whether what reaches nothing has a gradient of 0, or one that is undefined and not looked at.
        numbers: kinds that are tried, the simplest first.
        invariances: changes of the arguments under which the result is the same.
        compiled: sizes to compile it at for accelerators, as large as they are there in what decides tiling.
        platform: whose kernel it is; elsewhere it is interpreted.
        devices: how many it runs on.
        races: whether it is a fault that parallel grid steps use the same memory: not where all write and nobody reads.
    """

    name: str
    run: Callable[..., Any]
    twin: Callable[..., Any]
    inputs: Callable[[Draw], dict[str, Any]]
    sizes: Mapping[str, Sequence[int | str]]
    ragged: Mapping[str, Callable[[Sizes], SearchStrategy]] = field(default_factory=dict)
    dtypes: Sequence[str] = ("float32", "bfloat16")
    tolerance: Mapping[str, float] = field(default_factory=lambda: {"float32": 2.0**-19, "bfloat16": 2.0**-7})
    bound: Bound | None = None
    gradients: Sequence[str] = ()
    gradient_tolerance: Mapping[str, float] | None = None
    gradient_noise: Mapping[str, float] = field(default_factory=dict)
    gradient_bound: Bound | None = None
    dead_gradients: Literal["zero", "undefined"] = "zero"
    numbers: Sequence[str] = NUMBERS
    invariances: Sequence[Invariance] = ()
    compiled: Sequence[Sizes] = ()
    platform: Platform = "any"
    devices: int = 1
    races: bool = True

    def __post_init__(self) -> None:
        wrong = [
            ("numbers", [kind for kind in self.numbers if kind not in NUMBERS], NUMBERS),
            ("tolerance", [dtype for dtype in self.dtypes if dtype not in self.tolerance], tuple(self.tolerance)),
            ("sizes", [name for name, values in self.sizes.items() if not values], ("values for each name",)),
        ]
        for name, got, wanted in wrong:
            if got:
                raise ValueError(f"{self.name}: {name}: got {got[0]!r}, wanted one of {', '.join(wanted)}")
        for sizes in self.compiled:
            if sizes.keys() != self.sizes.keys():
                got, wanted = ", ".join(sizes), ", ".join(self.sizes)
                raise ValueError(f"{self.name}: compiled: got sizes {got}, wanted {wanted}")

    def case(self, text: str) -> Case:
        """The example that `Case.as_json` wrote.

        Raises:
            ValueError: it is none of this kernel.
        """
        form = "wanted the JSON of an example of this kernel, as a fault is reported with"
        try:
            made = Case(**json.loads(text))
        except (ValueError, TypeError) as problem:
            raise ValueError(f"case: {problem}; {form}") from None
        wanted = {"sizes": self.sizes, "ragged": self.ragged}
        for part, of in wanted.items():
            got = getattr(made, part)
            if not isinstance(got, dict) or got.keys() != of.keys():
                raise ValueError(f"case: {part}: got {got!r}, wanted {', '.join(of) or 'nothing'} in it")
        if made.dtype not in self.tolerance or made.numbers not in NUMBERS or type(made.seed) is not int:
            got = f"dtype {made.dtype!r}, numbers {made.numbers!r}, seed {made.seed!r}"
            raise ValueError(f"case: got {got}; {form}")
        return made


class Fault(Exception):
    """A law that does not hold.

    Attributes:
        law: its name.
        said: what was found, in one line.
        case: of which example; None where it is of none.
    """

    def __init__(self, law: str, said: str, case: Case | None = None):
        super().__init__(f"{law}: {said}")
        self.law, self.said, self.case = law, said, case
