"""Speed beside a peer or a law, everything interleaved in one run, medians and spreads printed as Markdown."""

if __name__ == "__main__":
    from deepseek_jax.interrupt import end_at_once

    end_at_once()

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from deepseek_jax.checkpoint import names
from deepseek_jax.checkpoint.files import new_folder
from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.cli import run
from deepseek_jax.config import MLAConfig, ModelConfig, preset, to_hf
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.ops.experts import expert_mlp

TOOLS = Path(__file__).resolve().parent
BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
SHARD = 500_000_000
CHUNK = 1 << 24
MIB = 1 << 20
# What transformers does for the same job: into memory, in bfloat16 as on any CPU, and out again. Written in its own
# layout of experts: 5.23 fails to turn what it unpacked back into the published one.
_PEER = """
import sys
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype="auto", quantization_config=FineGrainedFP8Config(dequantize=True)
)
model.save_pretrained(sys.argv[2], save_original_format=False)
"""


def decode(
    model: Path, /, *, batches: tuple[int, ...] = (1, 8, 32), tokens: int = 64, prompt: int = 32, rounds: int = 5
) -> None:
    """Decode tokens a second, greedy, float32, beside transformers' `generate` on the same weights.

    Both start from the same random prompts and draw the same number of tokens. A decode rate is the tokens after
    the first divided by the time beyond that of drawing one token alone, so that prefill does not count.

    Args:
        model: Hugging Face folder.
        batches: sequences at a time.
        tokens: new tokens a sequence.
        prompt: tokens a prompt.
        rounds: timed pairs a batch size, the two in turn.
    """
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise ValueError("transformers is not installed: pip install torch==2.13.0, then pip install -e '.[oracle]'")
    config, graphdef, weights = load_model(model)
    generator = Generator(config, graphdef)
    peer = peer_of(model)
    rng = np.random.default_rng(0)
    print("| batch | deepseek_jax tok/s | transformers tok/s | ratio, median (min to max) |\n|---|---|---|---|")
    for batch in batches:
        ids = rng.integers(0, config.vocab_size, (batch, prompt))
        prompts = ids.tolist()

        def ours(count: int, prompts: list = prompts) -> None:
            found = generator(
                weights, prompts, SamplingConfig(max_new_tokens=count, temperature=0.0), seeds=[0] * len(prompts)
            )
            assert all(len(c.tokens) == count for c in found)

        def theirs(count: int, ids: np.ndarray = ids) -> None:
            peer(ids, count)

        rates = _paired_rates([ours, theirs], tokens, batch, rounds)
        ratios = [a / b for a, b in zip(*rates, strict=True)]
        mine, other = (statistics.median(r) for r in rates)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {batch} | {mine:.1f} | {other:.1f} | {spread} |", flush=True)


def _paired_rates(contestants: list[Callable], tokens: int, batch: int, rounds: int) -> list[list[float]]:
    for contestant in contestants:  # compilation and first touches
        contestant(1), contestant(tokens)
    rates: list[list[float]] = [[] for _ in contestants]
    for _ in track(range(rounds), description=f"batch {batch}", transient=True, console=Console(stderr=True)):
        for contestant, found in zip(contestants, rates, strict=True):
            one, all_ = _seconds(lambda c=contestant: c(1)), _seconds(lambda c=contestant: c(tokens))
            found.append(batch * (tokens - 1) / (all_ - one))
    return rates


def peer_of(model: Path) -> Callable[[np.ndarray, int], None]:
    """transformers' greedy `generate` of so many tokens after prompts [B, T]."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    loaded.generation_config.eos_token_id = None  # both draw every token asked for

    def generate(ids: np.ndarray, count: int) -> None:
        tokens = torch.from_numpy(ids)
        with torch.inference_mode():
            out = loaded.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        assert out.shape[1] == ids.shape[1] + count

    return generate


def experts(
    *,
    counts: tuple[int, ...] = (16, 32, 64, 128),
    rows: int = 4096,
    width: int = 256,
    inner: int = 128,
    k: int = 4,
    rounds: int = 15,
) -> None:
    """Time of the routed experts as their number doubles at a fixed number a token, forward and gradients.

    Gradients of the tokens and, beside them, of the weights too, which are as large as all experts are.

    Args:
        counts: numbers of experts.
        rows: tokens.
        width: model width.
        inner: expert width.
        k: experts a token.
        rounds: timed rounds, all counts in turn.
    """
    functions = {count: _expert_layer(count, rows, width, inner, k) for count in counts}
    times: dict[tuple[int, str], list[float]] = {}
    for _ in track(range(rounds), description="rounds", transient=True, console=Console(stderr=True)):
        for count, kinds in functions.items():
            for kind, function in kinds.items():
                times.setdefault((count, kind), []).append(_seconds(function))
    heads = ("forward ms", "with gradients of tokens ms", "and of weights ms")
    print(f"| experts | {' | x the half | '.join(heads)} | x the half |\n{'|---' * 7}|")
    for count in counts:
        cells = []
        for kind in functions[count]:
            now = statistics.median(times[count, kind])
            half = [b / a for a, b in zip(times.get((count // 2, kind), []), times[count, kind], strict=False)]
            cells += [f"{now * 1e3:.1f}", f"{statistics.median(half):.2f}" if half else "-"]
        print(f"| {count} | {' | '.join(cells)} |")


def _expert_layer(count: int, rows: int, width: int, inner: int, k: int) -> dict[str, Callable]:
    rng = np.random.default_rng(count)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, mixing = normal(rows, width), jnp.full((rows, k), 1 / k)
    chosen = jnp.asarray(np.argsort(rng.random((rows, count)), axis=1)[:, :k], jnp.int32)
    weights = normal(count, width, inner), normal(count, width, inner), normal(count, inner, width)
    forward = jax.jit(expert_mlp)
    loss = lambda x, mixing, chosen, *w: jnp.sum(expert_mlp(x, mixing, chosen, *w) ** 2)
    gradients = {"tokens": (0, 1), "weights": (0, 1, 3, 4, 5)}
    kinds = {"forward": forward} | {kind: jax.jit(jax.grad(loss, of)) for kind, of in gradients.items()}
    calls = {kind: lambda f=f: jax.block_until_ready(f(x, mixing, chosen, *weights)) for kind, f in kinds.items()}
    for call in calls.values():
        call()
    return calls


class Measured(NamedTuple):
    """A finished process: seconds until what it wrote was on disk, and its peak resident memory in bytes."""

    seconds: float
    peak: int


def convert(
    folder: Path,
    /,
    *,
    gigabytes: float = 6.0,
    rounds: int = 3,
    latent: int = 512,
    seed: int = 0,
    transformers: bool = False,
) -> None:
    """Time and peak memory of convert_hf.py and export_hf.py beside `cp -r`, on an FP8 checkpoint of R1's layout.

    The checkpoint, of random bytes, is made when FOLDER does not hold it, and stays there. In every round it is
    copied, converted, and exported again. Each time starts with nothing of the input in the page cache, includes the
    start of the interpreter, and ends when what was written is on the disk. A memory is the process's VmHWM, which
    counts the pages of files that it maps.

    Args:
        folder: where there is room for four times the checkpoint.
        gigabytes: size of the checkpoint, 1e9 bytes each.
        rounds: timed rounds, all commands in turn.
        latent: kv_lora_rank. R1's 512 gives a matrix of 576 rows, 4.5 blocks, which transformers 5.23 fails to load;
            with 448 it loads.
        seed: of the random bytes.
        transformers: run transformers' from_pretrained and save_pretrained in every round as well.
    """
    source = folder / f"fp8-{gigabytes:g}gb-latent{latent}-seed{seed}"
    if not source.exists():
        config = sized_config(gigabytes, latent)
        _require_space(folder, 4 * sum(map(_nbytes, _published(config))))
        write_checkpoint(config, source, seed)
    wanted = _digests(source)
    total, largest = sum(t.nbytes for t in wanted.values()), max(t.nbytes for t in wanted.values())
    _require_space(folder, 3 * total)
    print(f"{total / 1e9:.2f} GB in {len(wanted)} tensors, the largest of {largest / MIB:.1f} MiB; rounds: {rounds}\n")
    runs: dict[str, list[Measured]] = {}
    failure = None
    for _ in track(range(rounds), description="rounds", transient=True, console=Console(stderr=True)):
        with tempfile.TemporaryDirectory(dir=folder, prefix="benchmark-") as name:
            _round(source, Path(name), wanted, runs)
            if transformers and failure is None:
                failure = _peer_round(source, Path(name), runs)
    start = _start_memory()
    limit = 1536 * MIB + start + largest
    _print_runs(runs, total, limit)
    if failure is not None:
        print(f"\ntransformers failed: {failure}")
    print(
        f"\nlimit: 1.5 GiB + {start / MIB:.1f} MiB of an interpreter at its start + the largest tensor"
        f"\nexported: all {len(wanted)} tensors bit-identical to the source in every round"
    )


def _round(source: Path, work: Path, wanted: dict, runs: dict[str, list[Measured]]) -> None:
    copied, converted, exported = work / "copied", work / "converted", work / "exported"
    # a copy of the bytes, where some file systems would share them
    commands = {
        "cp -r": (["cp", "-r", "--reflink=never"], source, copied),
        "convert_hf.py": ([sys.executable, TOOLS / "convert_hf.py"], source, converted),
        "export_hf.py": ([sys.executable, TOOLS / "export_hf.py"], converted, exported),
    }
    for label, (command, read, written) in commands.items():
        runs.setdefault(label, []).append(timed([*command, read, written], work, read))
        shutil.rmtree(copied, ignore_errors=True)
    _require_identical(_digests(exported), wanted)
    shutil.rmtree(converted), shutil.rmtree(exported)


def _peer_round(source: Path, work: Path, runs: dict[str, list[Measured]]) -> str | None:
    """The message of its failure: that, too, is a result."""
    try:
        measured = timed([sys.executable, "-c", _PEER, source, work / "saved"], work, source)
    except ValueError as problem:
        return str(problem)
    runs.setdefault("transformers", []).append(measured)
    shutil.rmtree(work / "saved")
    return None


def _print_runs(runs: dict[str, list[Measured]], total: int, limit: int) -> None:
    print("| | bytes | seconds, median (min to max) | GB/s | x cp's time | peak RSS, MiB | limit, MiB |")
    print("|---|---|---|---|---|---|---|")
    for label, these in runs.items():
        seconds = [r.seconds for r in these]
        ratios = [r.seconds / cp.seconds for r, cp in zip(these, runs["cp -r"], strict=False)]
        rate = total / statistics.median(seconds) / 1e9
        bound = f"{limit / MIB:.0f}" if label.endswith(".py") else "-"
        cells = [label, total, spread(seconds), f"{rate:.2f}", spread(ratios)]
        print(f"| {' | '.join(map(str, cells))} | {max(r.peak for r in these) / MIB:.0f} | {bound} |", flush=True)


def _forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def spread(values: list[float], digits: int = 2) -> str:
    """Median, least and most."""
    shown = [f"{of:.{digits}f}" for of in (statistics.median(values), min(values), max(values))]
    return "{} ({} to {})".format(*shown)


def timed(command: list[str | Path], folder: Path, read: Path) -> Measured:
    """Run a command to its end, and its writes to the disk of `folder`. ValueError with the last line of a failure.

    What it will `read` is on the disk alone when it starts, as a checkpoint larger than memory always is.
    """
    sync = lambda: subprocess.run(["sync", "-f", folder], check=True)
    sync()  # so that it does not wait for what others wrote before
    _forget(read)
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors) as process:
            peak = 0
            while process.poll() is None:
                peak = max(peak, _peak_memory(str(process.pid)))
                time.sleep(0.005)
        if process.returncode:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"{' '.join(map(str, command[:2]))}: exit status {process.returncode}: {last}")
    sync()
    return Measured(time.perf_counter() - start, peak)


def _peak_memory(process: str) -> int:
    """VmHWM of a process in bytes; 0 when it has ended and is not yet waited for."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _start_memory() -> int:
    """Peak memory of an interpreter that does nothing."""
    code = "print(open('/proc/self/status').read())"
    status = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def _require_space(folder: Path, wanted: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise ValueError(
            f"{folder}: {free / 1e9:.1f} GB free, wanted {wanted / 1e9:.1f}; choose another disk or fewer --gigabytes"
        )


def sized_config(gigabytes: float, latent: int = 512) -> ModelConfig:
    """R1's architecture, 64 experts a layer, with widths and layers for a checkpoint of about this size."""
    for width in (2048, 1024, 512, 256, 128, 64):
        two, three = (sum(map(_nbytes, _published(_scaled(width, latent, layers)))) for layers in (2, 3))
        layers = 2 + round((gigabytes * 1e9 - two) / (three - two))
        if layers >= 3:
            return _scaled(width, latent, layers)
    raise ValueError(f"gigabytes: got {gigabytes}, wanted at least {three / 1e9:.3f}")


def _scaled(width: int, latent: int, layers: int) -> ModelConfig:
    r1 = preset("r1-671b")
    return dataclasses.replace(
        r1,
        vocab_size=16 * width,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 128),
        attention=MLAConfig(
            q_lora_rank=3 * width // 8, kv_lora_rank=latent, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        moe=dataclasses.replace(
            r1.moe, n_routed_experts=64, moe_intermediate_size=11 * width // 16, first_k_dense_replace=1
        ),
    )


def _published(config: ModelConfig) -> list[names.Tensor]:
    return names.published(config, abstract_weights(config)[1])


def _nbytes(tensor: names.Tensor) -> int:
    return math.prod(tensor.shape) * BYTES[tensor.dtype]


def write_checkpoint(config: ModelConfig, target: Path, seed: int) -> None:
    """A Hugging Face folder of random valid numbers, one tensor in memory at a time; it appears when it is whole."""
    shards = list(_shards(_published(config)))
    weight_map = {}
    with new_folder(target) as partial:
        (partial / "config.json").write_text(json.dumps(to_hf(config), indent=2), encoding="utf-8")
        bar = track(enumerate(shards, 1), "checkpoint", len(shards), transient=True, console=Console(stderr=True))
        for number, shard in bar:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= {tensor.name: file for tensor in shard}
            with (partial / file).open("wb") as out:
                out.write(_header(shard))
                for tensor in shard:
                    out.write(_random_bytes(tensor, seed))
        index = {"metadata": {"total_size": sum(map(_nbytes, sum(shards, [])))}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _shards(tensors: list[names.Tensor]) -> Iterator[list[names.Tensor]]:
    shard, size = [], 0
    for tensor in tensors:
        if shard and size + _nbytes(tensor) > SHARD:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += _nbytes(tensor)
    yield shard


def _header(shard: list[names.Tensor]) -> bytes:
    listing: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        start, end = end, end + _nbytes(tensor)
        listing[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(listing).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _random_bytes(tensor: names.Tensor, seed: int) -> memoryview:
    """Every FP8 code but the NaNs, bfloat16 below 2 in magnitude, float32 (the scales) from 2**-13 to 2**-12."""
    # a copy has its original's path but for the first two steps, and so its original's bytes
    path = names.key(tensor.copy_of or tensor.path)
    rng = np.random.default_rng([seed, zlib.crc32(f"{path} {tensor.expert}".encode())])
    count = math.prod(tensor.shape)
    words = rng.integers(0, 2**64, -(-count * BYTES[tensor.dtype] // 8), dtype=np.uint64)
    if tensor.dtype == "F8_E4M3":
        bits = words.view(np.uint8)[:count]
        bits -= (bits & 0x7F) == 0x7F
    elif tensor.dtype == "BF16":
        bits = words.view(np.uint16)[:count]
        bits &= 0xBFFF
    else:
        bits = words.view(np.uint32)[:count]
        bits &= 0x7FFFFF
        bits |= 0x39000000
    return bits.data


class Stored(NamedTuple):
    """A tensor in a file: what it is, and the hash of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    digest: str


def _digests(folder: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors folder, file by file."""
    found: dict[str, Stored] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            listing = json.loads(stream.read(length))
            listing.pop("__metadata__", None)
            for name, line in sorted(listing.items(), key=lambda item: item[1]["data_offsets"]):
                start, end = line["data_offsets"]
                stream.seek(8 + length + start)
                digest = _digest(stream, end - start)
                found[name] = Stored(line["dtype"], tuple(line["shape"]), end - start, digest)
    return found


def _digest(stream, count: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for left in range(count, 0, -CHUNK):
        digest.update(stream.read(min(left, CHUNK)))
    return digest.hexdigest()


def _require_identical(got: dict[str, Stored], wanted: dict[str, Stored]) -> None:
    different = [name for name in sorted(got.keys() | wanted.keys()) if got.get(name) != wanted.get(name)]
    if different:
        raise ValueError(
            f"exported: {len(different)} of {len(wanted)} tensors differ from the source, the first of them "
            f"{different[0]!r}: got {got.get(different[0])}, wanted {wanted.get(different[0])}"
        )


def _seconds(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    run({"decode": decode, "experts": experts, "convert": convert})
