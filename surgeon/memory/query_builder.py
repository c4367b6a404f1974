"""VisMem's query builder: what the model has seen and said, condensed into a few vectors."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.memory.inserted import Constant, Initialiser, Normal

POSITIONS = 2048
"""Of hidden states and queries together; learned ones, as published."""
NUM_LAYERS, NUM_HEADS = 2, 8


class QueryBuilder(nn.Module):
    """Q = B([H, Q_init])[-K:], B a small transformer encoder in which H does not see the queries.

    Source: "VisMem", section on query building, and its released code for what the paper leaves open: pre-norm, GELU,
    learned positions over hidden states and queries, a norm at the end.
    """

    def __init__(self, hidden_size: int, num_queries: int, width: int | None = None) -> None:
        """`width`: of the encoder, where it is not to be the model's; hidden states are then mapped to it, and the
        queries back. Raises ValueError for a width that its heads cannot share."""
        super().__init__()
        width = width or hidden_size
        if width % NUM_HEADS:
            raise ValueError(f"the query builder's width {width} is not divisible by its {NUM_HEADS} heads")
        self.enter = nn.Identity() if width == hidden_size else nn.Linear(hidden_size, width)
        self.leave = nn.Identity() if width == hidden_size else nn.Linear(width, hidden_size)
        self.query_init = nn.Parameter(torch.empty(num_queries, width))
        self.positions = nn.Parameter(torch.empty(POSITIONS, width))
        self.layers = nn.ModuleList(EncoderLayer(width) for _ in range(NUM_LAYERS))
        self.norm = nn.LayerNorm(width)

    @property
    def num_queries(self) -> int:
        return len(self.query_init)

    @property
    def max_hidden_states(self) -> int:
        """How many it takes beside its queries."""
        return POSITIONS - self.num_queries

    def forward(self, hidden_states: Tensor, padding: Tensor | None = None) -> Tensor:
        """hidden_states [B, L, d], L at most `max_hidden_states`; padding bool [B, L], True where a row has none ->
        [B, K, d]."""
        batch, length, _ = hidden_states.shape
        queries = self.query_init.expand(batch, -1, -1)
        x = torch.cat((self.enter(hidden_states.to(queries.dtype)), queries), 1)
        # no slice: in an exported graph L varies
        x = x + self.positions.index_select(0, torch.arange(x.shape[1], device=x.device))
        mask = self._mask(length, x.shape[1], padding, x.device)
        for layer in self.layers:
            x = layer(x, mask)
        output: Tensor = self.leave(self.norm(x[:, length:]))
        return output.to(hidden_states.dtype)

    def _mask(self, length: int, total: int, padding: Tensor | None, device: torch.device) -> Tensor:
        """bool [1 or B, 1, L + K, L + K], True where a row of it sees a column: H sees H, the queries see all."""
        place = torch.arange(total, device=device)
        sees = ((place[None] < length) | (place[:, None] >= length))[None, None]
        if padding is None:
            return sees
        return sees & ~F.pad(padding, (0, total - length))[:, None, None]

    def initialisers(self, std: float) -> dict[str, Initialiser]:
        """Parameter name -> its value at insertion."""
        initialisers: dict[str, Initialiser] = {}
        for path, module in self.named_modules():
            for name, _ in module.named_parameters(recurse=False):
                key = f"{path}.{name}" if path else name
                norm = isinstance(module, nn.LayerNorm) and name == "weight"
                initialisers[key] = Constant(0.0) if name == "bias" else Constant(1.0) if norm else Normal(std)
        return initialisers


class EncoderLayer(nn.Module):
    """x + A(norm x), then x + W_2 gelu(W_1 norm x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, w], mask bool [1 or B, 1, T, T] -> [B, T, w]."""
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, NUM_HEADS, width // NUM_HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(attended)
        output: Tensor = x + self.down(F.gelu(self.up(self.mlp_norm(x))))
        return output
