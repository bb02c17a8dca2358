"""The pre-norm transformer block that the spatial and the temporal encoder share."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class TransformerBlock(nn.Module):
    """Self-attention, then an MLP, each with a norm before it and a residual around it.

    Source: Former-DFER (Zhao and Liu, ACM Multimedia 2021), whose block is the one of arXiv:2010.11929 with the
    tanh form of GELU and no bias on queries, keys and values.
    Shapes: B rows, N tokens, D feature width.

    Args:
        width: D.
        heads: attention heads; must divide width.
        mlp_width: hidden width of the MLP.
    """

    def __init__(self, *, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, mlp_width)
        self.contract = nn.Linear(mlp_width, width)
        self.apply(init_linear)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """One block, shape kept."""
        qkv = self.qkv(self.attention_norm(x))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        read = rearrange(_attention(q, k, v), "b h n d -> b n (h d)")
        x = x + self.out(read)
        y: Tensor = self.contract(F.gelu(self.expand(self.mlp_norm(x)), approximate="tanh"))
        return x + y


def _attention(
    q: Float[Tensor, "B H N D"], k: Float[Tensor, "B H N D"], v: Float[Tensor, "B H N D"]
) -> Float[Tensor, "B H N D"]:
    """Scaled dot products; on a CPU in float32 under autocast, too, where the gradient takes half of bf16's time."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float())


def init_linear(module: nn.Module) -> None:
    """Truncated normal (standard deviation 0.02) and zero bias for linear layers, as in arXiv:2010.11929."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_conv(module: nn.Module) -> None:
    """Kaiming normal over the outputs for convolutions, one and zero for batch norms (arXiv:1502.01852)."""
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
