"""Say what a checkpoint is, or should be, from its configuration and headers alone; no weight is read."""

import dataclasses
from json import dumps
from pathlib import Path

from deepseek_jax import config
from deepseek_jax.checkpoint.summary import Summary, of_model, of_preset
from deepseek_jax.distributed import printable
from deepseek_jax.report.progress import format_bytes

_LISTED = 10


def main(model: Path | None = None, /, *, preset: str | None = None, json: bool = False) -> None:
    """Describe MODEL, or what the published checkpoint of a preset holds. Exit status 1 if tensors are amiss.

    Args:
        model: Hugging Face or converted folder, or a name on the hub, of which the headers alone are fetched.
        preset: name of a published configuration, such as r1-671b, in place of a model.
        json: print one JSON object: architecture, tensors, bytes, parameters (without FP8 scales), mtp_parameters,
            bytes_by_dtype, mtp_promised, mtp_held, missing, unexpected.
    """
    if (model is None) == (preset is None):
        raise ValueError("wanted either a model or --preset NAME")
    summary = of_preset(config.preset(preset)) if model is None else of_model(model)
    print(dumps(dataclasses.asdict(summary), indent=2) if json else printable(_text(summary)))
    if summary.missing or summary.unexpected:
        raise SystemExit(1)


def _text(summary: Summary) -> str:
    lines = [
        f"architecture  {summary.architecture}",
        f"tensors       {summary.tensors:,}",
        f"bytes         {summary.bytes:,} ({format_bytes(summary.bytes)})",
        *(f"  {dtype:<12}{size:,} ({format_bytes(size)})" for dtype, size in summary.bytes_by_dtype.items()),
        f"parameters    {summary.parameters:,}, of them in MTP modules {summary.mtp_parameters:,}",
    ]
    if summary.mtp_promised:
        lines.append(f"MTP modules   {summary.mtp_held} of the {summary.mtp_promised} in config.json")
    for what, names in (("missing", summary.missing), ("unexpected", summary.unexpected)):
        lines.append(f"{what:<14}{len(names)}")
        lines += [f"  {name!r}" for name in names[:_LISTED]]  # a damaged file may hold any name
        if len(names) > _LISTED:
            lines.append(f"  and {len(names) - _LISTED} more; --json lists them all")
    return "\n".join(lines)
