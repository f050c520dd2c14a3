"""What a model must have routed, from Hugging Face transformers in float32: an implementation that is not ours.

Routing of position i depends on tokens 0..i alone, so one forward pass per token sequence tells the experts of each
position, however the serving engine cut the sequence into steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


@dataclass
class Routing:
    """One sequence: ``ids`` [tokens, layers, k], ``logits`` float64 [tokens, layers, experts]."""

    ids: np.ndarray
    logits: np.ndarray


class Oracle:
    """Routing of token sequences by the model in a directory."""

    #: Two frameworks add in different orders; a k-th and (k+1)-th logit closer than this may change places.
    TIE = 1e-5

    def __init__(self, model: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        config = self.model.config
        self.experts, self.top_k, self.layers = config.num_experts, config.num_experts_per_tok, config.num_hidden_layers
        self.ties = 0
        self._known: dict[tuple[int, ...], Routing] = {}

    def routing(self, tokens: list[int]) -> Routing:
        key = tuple(tokens)
        if key not in self._known:
            with torch.no_grad():
                output = self.model(torch.tensor([tokens]), output_router_logits=True)
            logits = torch.stack([x.view(len(tokens), -1) for x in output.router_logits], dim=1).double()
            best = logits.topk(self.top_k + 1, dim=-1)
            self.ties += int((best.values[..., -2] - best.values[..., -1] < self.TIE).sum())
            self._known[key] = Routing(best.indices[..., :-1].numpy(), logits.numpy())
        return self._known[key]

    def counts(self, ids: np.ndarray) -> np.ndarray:
        """[tokens, layers, k] -> tokens per [layer, expert]."""
        result = np.zeros((self.layers, self.experts), dtype=np.int64)
        for layer in range(self.layers):
            np.add.at(result[layer], ids[:, layer].ravel(), 1)
        return result


def entropy_ratio(logits: np.ndarray) -> np.ndarray:
    """Entropy of softmax over the last axis, over ln(experts), in float64."""
    x = logits - logits.max(-1, keepdims=True)
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    return -(p * np.log(p)).sum(-1) / np.log(logits.shape[-1])
