"""nn.MultiheadAttention as linear layers that see whole batches, so that per-example gradients exist."""

import torch
from torch import nn
from torch.nn import functional

from urna.protocol.errors import ModelError


class AttentionTwin(nn.Module):
    """Same arguments and results as the nn.MultiheadAttention that it is made of, for batched inputs.

    The stacked weight of queries, keys and values becomes three layers, ``q_proj``, ``k_proj`` and ``v_proj``; ``out_proj``
    keeps its name. Every layer is given (b, s, e), whatever ``batch_first`` says.
    """

    in_proj_weight = None  # what nn.TransformerEncoderLayer looks at before it takes its fused path, which hooks do not see
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ModelError("expected nn.MultiheadAttention without bias_k and add_zero_attn: choose another model")
        super().__init__()
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.batch_first, self.dropout = attention.batch_first, attention.dropout
        for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
            self.add_module(name, _part(attention, i, f"{name}_weight"))
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,  # noqa: ARG002  # a hint; the mask itself is always given
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Each (b, s, e), or (s, b, e) without ``batch_first`` -> outputs and, where wanted, attention weights."""
        if query.dim() != 3:
            raise ModelError(f"expected a batch for an attention layer, found a tensor {tuple(query.shape)}")
        if not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._heads("q_proj", query), self._heads("k_proj", key), self._heads("v_proj", value)
        scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5)  # (b, h, t, s)
        if attn_mask is not None:  # (t, s), or (b * h, t, s)
            mask = attn_mask if attn_mask.dim() == 2 else attn_mask.view(len(query), self.num_heads, *attn_mask.shape[1:])
            scores = scores + _additive(mask, scores)
        if key_padding_mask is not None:  # (b, s)
            scores = scores + _additive(key_padding_mask, scores)[:, None, None, :]
        weights = functional.softmax(scores, dim=-1)
        out = functional.dropout(weights, self.dropout, self.training) @ v
        mixed = self.out_proj(out.transpose(1, 2).flatten(2))
        shown = (weights.mean(1) if average_attn_weights else weights) if need_weights else None
        return mixed if self.batch_first else mixed.transpose(0, 1), shown

    def _heads(self, name: str, given: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.get_submodule(name)(given)
        return projected.view(*given.shape[:2], self.num_heads, -1).transpose(1, 2)  # (b, h, s, e / h)


def _additive(mask: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask.to(scores.dtype)
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, float("-inf"))


def _part(attention: nn.MultiheadAttention, i: int, own_name: str) -> nn.Linear:
    stacked = attention.in_proj_weight  # None where keys or values have another length
    weight = attention.get_parameter(own_name) if stacked is None else _third(stacked, i)
    return _linear(weight, None if attention.in_proj_bias is None else _third(attention.in_proj_bias, i))


def _third(stacked: torch.Tensor, i: int) -> nn.Parameter:
    return nn.Parameter(stacked.detach().chunk(3)[i].clone(), requires_grad=stacked.requires_grad)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    assert isinstance(weight, nn.Parameter)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")  # no random draw
    linear.weight = weight
    linear.register_parameter("bias", bias if isinstance(bias, nn.Parameter) else None)
    return linear
