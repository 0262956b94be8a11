"""transformers on the same weights: what most people would use instead."""

from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np


def why_none(*packages: str) -> str:
    """Why there is no peer here that needs these packages beside torch; empty where there is one."""
    missing = [name for name in ("torch", *packages) if find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed: pip install torch==2.13.0, then pip install -e '.[oracle]'"
    import torch

    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        return "this torch sees no GPU"
    return "torch does not run on a TPU" if jax.default_backend() == "tpu" else ""


class Peer:
    """A model of transformers, on the GPU where there is one.

    Args:
        folder: Hugging Face folder.
        dtype: of weights and computation.
    """

    def __init__(self, folder: Path, dtype: str = "float32"):
        import torch
        from transformers import AutoModelForCausalLM

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        loaded.generation_config.eos_token_id = None  # both draw every token asked for
        self.model = loaded.to(self.device)

    def generate(self, ids: np.ndarray, count: int) -> None:
        """So many greedy tokens after prompts [B, T]."""
        import torch

        tokens = torch.from_numpy(ids).to(self.device)
        with torch.inference_mode():
            out = self.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        assert out.shape[1] == ids.shape[1] + count
        self._finish()

    def update(self, ids: np.ndarray, dtype: str) -> None:
        """One step of AdamW on the next token of rows [B, T + 1], in `dtype`, the gradient clipped at norm 1."""
        import torch

        tokens = torch.from_numpy(ids).to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = self.model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._finish()

    @cached_property
    def _optimizer(self) -> Any:
        import torch

        self.model.train()
        return torch.optim.AdamW(self.model.parameters(), lr=1e-6, weight_decay=0.0)

    def _finish(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()


def torch_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, dtype: str) -> Callable[[], None]:
    """torch's own causal attention forward and backward: q [B, T, N, K], k and v [B, G, T, K]."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    to_torch = lambda x: torch.from_numpy(np.array(x, np.float32)).to(device, getattr(torch, dtype)).requires_grad_()
    query, key, value = to_torch(q.swapaxes(1, 2)), to_torch(k), to_torch(v)

    def once() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out.sum(), (query, key, value))
        if device == "cuda":
            torch.cuda.synchronize()

    return once
