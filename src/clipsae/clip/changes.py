"""The last block on many versions of one image that differ in few tokens.

What is the same in all of them is computed once: keys and values of the tokens that no version
changes. T tokens of the image, d width, V versions, P changed tokens over all versions, H heads.
"""

from dataclasses import dataclass, replace

import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn


@dataclass(frozen=True)
class Changes:
    """Versions of one image's stream.

    Attributes:
        stream: [T, d], what all begin with.
        version, token: LongTensor [P], where they change; no pair occurs twice.
        change: [P, d], what is added there.
        versions: V.
    """

    stream: Tensor
    version: Tensor
    token: Tensor
    change: Tensor
    versions: int

    def to(self, dtype: torch.dtype) -> "Changes":
        """The same in another precision."""
        return replace(self, stream=self.stream.to(dtype), change=self.change.to(dtype))

    def streams(self) -> Tensor:
        """All versions written out, [V, T, d]."""
        found = self.stream.repeat(self.versions, 1, 1)
        found[self.version, self.token] += self.change
        return found


def class_token_of_changes(block: ResidualAttentionBlock, changes: Changes) -> Tensor:
    """The block's output for the class token, the first of the stream, [V, d]."""
    stream, version, token, change = changes.stream, changes.version, changes.token, changes.change
    attention = block.attn
    heads, width = attention.num_heads, stream.shape[-1]
    of_query, of_rest = attention.in_proj_weight.split((width, 2 * width))
    query_bias, rest_bias = attention.in_proj_bias.split((width, 2 * width))

    def keys_and_values(x: Tensor) -> tuple[Tensor, Tensor]:
        both = nn.functional.linear(block.ln_1(x), of_rest, rest_bias)
        keys, values = both.unflatten(-1, (2, heads, -1)).unbind(dim=-3)
        return keys, values

    class_token = stream[0].repeat(changes.versions, 1)
    at_first = token == 0
    class_token[version[at_first]] += change[at_first]
    query = nn.functional.linear(block.ln_1(class_token), of_query, query_bias)
    query = query.unflatten(-1, (heads, -1)) / (width // heads) ** 0.5
    keys, values = keys_and_values(stream)  # [T, H, d / H]
    new_keys, new_values = keys_and_values(stream[token] + change)  # [P, H, d / H]
    scores = torch.einsum("vhe,the->vth", query, keys)
    scores[version, token] = (query[version] * new_keys).sum(dim=-1)
    weights = scores.softmax(dim=1)
    mixed = torch.einsum("vth,the->vhe", weights, values)
    instead = weights[version, token][:, :, None] * (new_values - values[token])
    mixed = mixed.index_add(0, version, instead).flatten(1)
    x = class_token + block.ls_1(attention.out_proj(mixed))
    return x + block.ls_2(block.mlp(block.ln_2(x)))
