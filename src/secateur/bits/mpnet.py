"""MPNet's attention by the function that other architectures call through transformers' interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

from secateur.bits.modules import attention


class MPNetBits(MPNetSelfAttention):
    """`MPNetSelfAttention` on quantised operands."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        """What `MPNetSelfAttention` returns: (output,) or (output, probabilities)."""
        shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        q, k, v = (part(hidden_states).view(shape).transpose(1, 2) for part in (self.q, self.k, self.v))
        added = [part for part in (position_bias, attention_mask) if part is not None]
        mask = added[0] + added[1] if len(added) == 2 else next(iter(added), None)
        context, probabilities = attention(self, q, k, v, mask, self.dropout, self.attention_head_size**-0.5)
        output = self.o(context.flatten(2))
        return (output, probabilities) if output_attentions else (output,)


OWN: dict[type[nn.Module], type[nn.Module]] = {MPNetSelfAttention: MPNetBits}
"""Attention that does not go through transformers' interface: its class, and the one on quantised operands."""
