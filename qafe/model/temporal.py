"""T-Former: the frames of one segment -> one RGB token."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..config import RGBEncoderConfig
from .transformer import TransformerBlock


class TemporalFormer(nn.Module):
    """A transformer over frames whose class token becomes the segment's token.

    Source: Former-DFER's T-Former (Zhao and Liu, ACM Multimedia 2021), as used in arXiv:2312.00856, section 3.
    Differs: width, depth and the number of frames are free.
    Shapes: N segments, F frames per segment, D = config.token_width.

    Args:
        config: width, heads and depth.
        frames: F.
    """

    def __init__(self, config: RGBEncoderConfig, *, frames: int) -> None:
        super().__init__()
        width = config.token_width
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, frames + 1, width))
        self.transformer = nn.ModuleList(
            TransformerBlock(width=width, heads=config.temporal_heads, mlp_width=config.temporal_mlp)
            for _ in range(config.temporal_depth)
        )
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, x: Float[Tensor, "N F D"]) -> Float[Tensor, "N D"]:
        """One token a segment."""
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)  # N F+1 D
        x = x + self.position
        for block in self.transformer:
            x = block(x)
        return x[:, 0]  # N D
