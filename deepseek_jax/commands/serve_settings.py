"""The settings of `serve`: options by groups, under vLLM's names where it has them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from deepseek_jax.commands.generate_settings import EngineOptions
from deepseek_jax.generation.engine_config import CacheDType, EngineConfig
from deepseek_jax.model.packing import Quantization
from deepseek_jax.model.precision import Precision
from deepseek_jax.serve.settings import ServeConfig

KEY_VARIABLE = "DEEPSEEK_JAX_API_KEY"
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
MADE = Path("runs/r1_zero/model")
"""What the train command without options makes."""


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """Who may ask, and how much.

    Args:
        host: address to listen on; 0.0.0.0 is every one.
        port: to listen on.
        served_model_name: names of the model in requests; the last part of MODEL without it.
        api_key: keys that requests need, each of at least 8 characters. Other users of the machine can read command
            lines: the variable DEEPSEEK_JAX_API_KEY, keys with commas, keeps them to itself.
        rate_limit: calls of each key, or without keys of each address; None is no limit.
        max_waiting: completions that may wait while others run; more are told to come again.
        max_n: completions of one call.
        max_body: bytes of a request.
        call_seconds: an answer must be done within.
        grace_seconds: answers may take after a SIGTERM.
        temperature: where a request says nothing.
        top_p: where a request says nothing.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: tuple[str, ...] = ()
    api_key: tuple[str, ...] = ()
    rate_limit: str | None = "60/minute"
    max_waiting: int = 256
    max_n: int = 16
    max_body: int = 4 << 20
    call_seconds: float = 3600.0
    grace_seconds: float = 30.0
    temperature: float = 0.6
    top_p: float = 0.95

    def serving(self, name: str) -> ServeConfig:
        """The server's settings.

        Args:
            name: of the model, where no other is given.
        """
        keys = self.api_key or tuple(key for key in os.environ.get(KEY_VARIABLE, "").split(",") if key)
        same = ("rate_limit", "max_waiting", "max_n", "max_body", "call_seconds", "grace_seconds")
        same += ("temperature", "top_p")
        return ServeConfig(
            names=self.served_model_name or (name,),
            api_keys=keys,
            # a page of somebody else's, in a browser on this machine, is not to speak for its user
            allowed_hosts=_LOOPBACK if self.host in _LOOPBACK and not keys else None,
            **{name: getattr(self, name) for name in same},
        )


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """How it is computed.

    Args:
        max_model_len: tokens of a prompt with its completion; None takes the model's context, as far as the cache has
            memory for it.
        max_num_seqs: completions that run at a time.
        max_num_batched_tokens: tokens computed in a step.
        decode_steps: tokens of a completion between two looks at the others, and at clients that have gone.
        gpu_memory_utilization: share of a device's free memory for the cache.
        mesh_data: replicas of the model. Where a size of the mesh is given, it is of all devices, of every process, and
            the others are chosen to suit the model; without any the model is on one device, and in several processes
            on all.
        mesh_expert: groups that whole experts are divided between, with mesh_tensor.
        mesh_tensor: parts of heads, inner widths and vocabulary.
        dtype: of weights, activations and cache; auto is bfloat16 on accelerators and float32 on the CPU.
        quantization: projections as they are kept and computed from, as of `generate`.
        kv_cache_dtype: what the cache keeps instead: fp8 and int8 are codes with a scale a token and head.
        speculate: guess tokens and verify several in a step, which changes none: "mtp" by the model's own modules,
            "lookup" from what the text had before.
        draft_tokens: how many are guessed; None is 1 with mtp and 4 with lookup.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 1024
    decode_steps: int = 4
    gpu_memory_utilization: float = 0.9
    mesh_data: int | None = None
    mesh_expert: int | None = None
    mesh_tensor: Annotated[int | None, tyro.conf.arg(aliases=("--tensor-parallel-size",))] = None
    dtype: Precision = "auto"
    quantization: Quantization = "none"
    kv_cache_dtype: CacheDType = "auto"
    speculate: Literal["none", "lookup", "mtp"] = "none"
    draft_tokens: int | None = None

    @property
    def options(self) -> EngineOptions:
        """Those of `generate` among them."""
        same = ("dtype", "quantization", "kv_cache_dtype", "speculate", "draft_tokens")
        return EngineOptions(**{name: getattr(self, name) for name in same})

    @property
    def mesh(self) -> dict[str, int | None]:
        """Sizes of its axes, those that are to be chosen None."""
        return {axis: getattr(self, f"mesh_{axis}") for axis in ("data", "expert", "tensor")}

    @property
    def engine(self) -> EngineConfig:
        """How the engine runs. It admits by what is known, not by limits that few completions reach."""
        same = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "decode_steps")
        return EngineConfig(
            admission="preempt",
            memory_utilization=self.gpu_memory_utilization,
            **{name: getattr(self, name) for name in same},
            **self.options.of_engine,
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a server.

    Args:
        model: Hugging Face or converted folder with its tokenizer, or a name on the hub; without it the one that
            `train` without options has made.
        config: settings by the names of the options, as .toml or .yaml; what the command line says counts before them.
        http: Who may ask, and how much.
        engine: How it is computed.
    """

    model: Annotated[Path | None, tyro.conf.Positional] = None
    config: Path | None = None
    http: HttpOptions = HttpOptions()
    engine: ServingOptions = ServingOptions()

    def __post_init__(self) -> None:
        if not 0 <= self.http.port < 65536:
            raise ValueError(f"port: got {self.http.port}, wanted 0 (any) to 65535")
        for name in ("max_num_seqs", "max_num_batched_tokens", "decode_steps"):
            if getattr(self.engine, name) < 1:
                raise ValueError(f"{name}: got {getattr(self.engine, name)}, wanted at least 1")
        self.http.serving("model")
        try:
            _ = self.engine.engine  # refuses what an engine cannot be
        except ValueError as problem:
            raise ValueError(str(problem).replace("memory_utilization", "gpu_memory_utilization")) from None


COMMON = (
    *("model", "host", "port", "served_model_name", "api_key", "rate_limit", "max_model_len", "max_num_seqs"),
    *("gpu_memory_utilization", "mesh_tensor", "dtype", "quantization", "speculate"),
)
"""The options that the short help shows."""
