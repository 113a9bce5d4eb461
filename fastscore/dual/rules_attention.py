"""Attention, as plain operations."""

import math
from typing import Any

import torch
import torch.nn.functional as F

from fastscore.dual.samples import by_parts
from fastscore.dual.table import rule


@rule("scaled_dot_product_attention", apart=by_parts)
def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))

    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        return F.dropout(scores.softmax(-1), dropout_p) @ value
    if attn_mask.dtype != torch.bool:
        return F.dropout((scores + attn_mask).softmax(-1), dropout_p) @ value

    nothing = ~attn_mask.any(-1, keepdim=True)  # such rows attend to nothing and are zero
    weights = (
        scores.masked_fill(~(attn_mask | nothing), -math.inf).softmax(-1).masked_fill(nothing, 0)
    )
    return F.dropout(weights, dropout_p) @ value


@rule("multi_head_attention_forward")
def multi_head_attention(
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: Any,
    num_heads: Any,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: Any,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """Tokens first: query (L, B, E).

    What this leaves out goes through stock forward mode, with attention in plain operations.
    """
    if (
        need_weights
        or query.dim() != 3
        or any(a is not None for a in (bias_k, bias_v, static_k, static_v))
        or add_zero_attn
    ):
        return NotImplemented

    weights = (
        (q_proj_weight, k_proj_weight, v_proj_weight)
        if use_separate_proj_weight
        else in_proj_weight.chunk(3)
    )
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    if query is key is value and not use_separate_proj_weight:
        parts = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        parts = [F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases)]

    # (B, H, L, E/H).
    q, k, v = (t.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for t in parts)
    mask = _attention_mask(attn_mask, key_padding_mask, len(q), num_heads, q)
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p if training else 0.0)
    return F.linear(out.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias), None


def _attention_mask(attn_mask, padding, B, H, q):
    """One additive mask that broadcasts to (B, H, L, S).

    In the given ones True means: leave out.
    """

    def additive(mask):
        return (
            torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(mask, -math.inf)
            if mask.dtype == torch.bool
            else mask
        )

    total = None if padding is None else additive(padding)[:, None, None]
    if attn_mask is None:
        return total

    attn_mask = additive(attn_mask)
    attn_mask = attn_mask.unflatten(0, (B, H)) if attn_mask.dim() == 3 else attn_mask
    return attn_mask if total is None else attn_mask + total
