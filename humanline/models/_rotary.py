import torch
from torch import Tensor, nn


class RotaryEmbeddings(nn.Module):
    """Rotary positions that pair each dimension of a head with the one half a head away, as in transformers.

    Weights, and norms of heads, therefore keep the order that they have in Hugging Face's files.

    Args:
        dim (int): dimensions of a head.
        max_seq_len (int): number of positions in the tables.
        base (float): the angle of pair ``i`` grows by ``base ** (-2 i / dim) / factor`` radians a position.
        factor (float): linear scaling of positions.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, dim: int, max_seq_len: int, base: float, factor: float = 1.0) -> None:
        super().__init__()
        self.dim, self.max_seq_len, self.base, self.factor = dim, max_seq_len, base, factor
        self.rope_init()

    def rope_init(self) -> None:
        """Computes the tables, float32 ``[max_seq_len, dim / 2]``."""
        frequencies = 1.0 / (self.base ** (torch.arange(0, self.dim, 2).float() / self.dim)) / self.factor
        angles = torch.outer(torch.arange(self.max_seq_len).float(), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        """
        Args:
            x (Tensor): queries or keys, ``[B, S, H, D]``.
            input_pos (Tensor | None): positions, int64 ``[B, S]`` or ``[1, S]``; None counts from 0.

        Returns:
            Tensor: ``x`` turned.
        """
        at = slice(x.size(1)) if input_pos is None else input_pos
        cos, sin = (table[at].unsqueeze(-2).to(x.dtype) for table in (self.cos, self.sin))
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
