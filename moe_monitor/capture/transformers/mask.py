"""Which rows of a forward pass are real tokens: read from the attention mask that the model itself is given."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


class MaskError(ValueError):
    """The attention mask does not tell which tokens are padding."""


def positional_names(module: nn.Module) -> list[str]:
    """Names of the parameters of the module's class's forward, in order, without self."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def argument(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """One argument of a call, wherever it was passed; None if it was not."""
    if name in kwargs:
        return kwargs[name]
    at = names.index(name) if name in names else len(args)
    return args[at] if at < len(args) else None


def _past(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Tokens already in the key-value cache: an int, or a 0-d tensor for static caches."""
    cache = argument(names, args, kwargs, "past_key_values")
    length = getattr(cache, "get_seq_length", None)
    return length() if length is not None else 0


def shape(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """(sequences, tokens of each) of a call, padding included."""
    ids = argument(names, args, kwargs, "input_ids")
    stream: Any = ids if ids is not None else argument(names, args, kwargs, "inputs_embeds")
    return int(stream.shape[0]), int(stream.shape[1])


def lengths(kwargs: dict[str, Any], each: int) -> int | Tensor:
    """Tokens that every request brings to a pass: ``each``, or in continuous batching cumulative ones [requests+1]."""
    if "write_index" in kwargs and isinstance(ends := kwargs.get("cu_seq_lens_q"), Tensor):
        return ends.clone()  # the next pass writes its own into the same memory
    return each


def real_tokens(
    names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], skip: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """(real, token ids) of a call: bool [batch*sequence] or None if all are real; ids [batch*sequence] or None.

    A 2-d mask [batch, past+sequence] is right-aligned with the tokens. Of a 4-d mask (or a dictionary of them, one
    per attention type) a token is real if it may attend to itself. Continuous batching tells by ``cu_seq_lens_q`` how
    many tokens come before the padding. Rows with a token id in ``skip`` are not real.
    Raises MaskError for any other mask. Traceable by torch.compile.
    """
    ids = argument(names, args, kwargs, "input_ids")
    embeds = argument(names, args, kwargs, "inputs_embeds")
    stream = ids if ids is not None else embeds
    if stream is None:
        raise MaskError("neither input_ids nor inputs_embeds was given")
    batch, length = stream.shape[0], stream.shape[1]
    mask = argument(names, args, kwargs, "attention_mask")
    if "write_index" in kwargs:  # continuous batching: requests one after the other in one row, then padding
        ends = kwargs.get("cu_seq_lens_q")
        if batch != 1 or not isinstance(ends, Tensor):
            raise MaskError("this form of continuous batching does not tell which tokens are padding")
        return torch.arange(length, device=ends.device) < ends.max(), None if ids is None else ids.detach().reshape(-1)
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    real: Tensor | None
    if mask is None:
        real = None
    elif not isinstance(mask, Tensor):
        raise MaskError(f"an attention mask of type {type(mask).__name__} does not tell which tokens are padding")
    elif mask.ndim == 2:
        if mask.shape[1] < length:
            raise MaskError(f"an attention mask for {mask.shape[1]} tokens was given with {length} tokens")
        real = mask[:, -length:].ne(0)
    elif mask.ndim == 4:
        at = _past(names, args, kwargs) + torch.arange(length, device=mask.device)
        at = at.clamp(max=mask.shape[-1] - 1)
        own = mask[:, 0].gather(-1, at[None, :, None].expand(mask.shape[0], -1, 1)).squeeze(-1)
        own = own if own.dtype == torch.bool else own > -1  # additive masks: 0 may attend, a huge negative may not
        real = own.expand(batch, -1)
    else:
        raise MaskError(f"an attention mask of shape {tuple(mask.shape)} does not tell which tokens are padding")
    if skip and ids is not None:
        kept = torch.isin(ids, torch.tensor(skip, device=ids.device), invert=True)
        real = kept if real is None else real.to(kept.device) & kept
    return (None if real is None else real.reshape(-1)), (None if ids is None else ids.detach().reshape(-1))
