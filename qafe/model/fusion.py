"""The fusion: the tokens of two streams -> the tokens that the head scores.

Every fusion is a module ``(rgb, heatmap) -> tokens``; `FUSIONS` names them. They share their ends, so that a
search compares what lies between: project each stream to one width, add the learned position, let the streams
meet (`meet`, the part that differs), mix the tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ..config import FusionConfig
from ..errors import ConfigError
from .transformer import init_linear


class Fusion(nn.Module, ABC):
    """What all fusions share; a subclass says in `meet` how the streams meet.

    Source: arXiv:2312.00856, section 3. Differs: streams of any width and number of segments are accepted, either
    stream or none may get the position, and the mixer is a choice.
    Shapes: B clips, S segments per clip, R and H token widths of the streams, D = config.width, N tokens out.

    Args:
        config: all settings of the fusion.
        rgb_width: R.
        heatmap_width: H.
        segments: S that the position and the mixer are made for.
    """

    tokens_per_segment = 2

    def __init__(self, config: FusionConfig, *, rgb_width: int, heatmap_width: int, segments: int) -> None:
        super().__init__()
        self.config = config
        # A stream that has the right width already needs no weights here: the published layout has none.
        self.project_rgb = _projection(rgb_width, config.width)
        self.project_heatmap = _projection(heatmap_width, config.width)
        self.position_rgb = _position(config.position in ("rgb", "both"), segments, config.width)
        self.position_heatmap = _position(config.position in ("heatmap", "both"), segments, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.mixer = MIXERS[config.mixer](config.width, self.tokens_per_segment * segments)

    def forward(
        self, rgb: Float[Tensor, "B S R"], heatmap: Float[Tensor, "B S H"]
    ) -> Float[Tensor, "B N {self.config.width}"]:
        """The tokens of both streams, fused and mixed; N is 2 S, S (sum) or 1 (attention_pool)."""
        rgb = _add_position(self.project_rgb(rgb), self.position_rgb)  # B S D
        heatmap = _add_position(self.project_heatmap(heatmap), self.position_heatmap)  # B S D
        tokens = self.meet(rgb, heatmap)  # B 2S D, or B S D
        mixed: Tensor = self.mixer(tokens)
        return mixed

    @abstractmethod
    def meet(self, rgb: Float[Tensor, "B S D"], heatmap: Float[Tensor, "B S D"]) -> Float[Tensor, "B N D"]:
        """The one step that a kind of fusion defines."""


class ConcatFusion(Fusion):
    """Both streams' tokens side by side; only the mixer and the head see them together."""

    def meet(self, rgb: Float[Tensor, "B S D"], heatmap: Float[Tensor, "B S D"]) -> Float[Tensor, "B N D"]:
        """Heatmap tokens first, as in the published layout."""
        return self.dropout(torch.cat([heatmap, rgb], dim=1))  # type: ignore[no-any-return]


class SumFusion(Fusion):
    """One token a segment: the sum of the two streams' tokens."""

    tokens_per_segment = 1

    def meet(self, rgb: Float[Tensor, "B S D"], heatmap: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """Element by element."""
        return self.dropout(rgb + heatmap)  # type: ignore[no-any-return]


class CrossFusion(Fusion):
    """Lets each stream read the other, layer by layer, then returns both.

    Both streams of a layer read the other's state before that layer.
    Source: arXiv:2312.00856, section 3. Differs: separate weights for the two directions, a gate on what is read,
    and reading in one direction only are choices.

    Args:
        split: separate weights for each direction; published is one set for both.
        gated: a learned gate on what is read.
    """

    def __init__(
        self,
        config: FusionConfig,
        *,
        rgb_width: int,
        heatmap_width: int,
        segments: int,
        split: bool = False,
        gated: bool = False,
    ) -> None:
        super().__init__(config, rgb_width=rgb_width, heatmap_width=heatmap_width, segments=segments)
        self.layers = nn.ModuleList(CrossLayer(config, split=split, gated=gated) for _ in range(config.layers))
        # The published network has this norm and never uses it: kept, frozen, so that its files load whole.
        self.unused_norm = nn.LayerNorm(config.width).requires_grad_(False)

    def meet(self, rgb: Float[Tensor, "B S D"], heatmap: Float[Tensor, "B S D"]) -> Float[Tensor, "B N D"]:
        """Layers of mutual reading; heatmap tokens first, as in the published layout."""
        for layer in self.layers:
            rgb, heatmap = layer(rgb, heatmap)
        return torch.cat([heatmap, rgb], dim=1)


class CrossLayer(nn.Module):
    """One layer of mutual reading: a block shared by both directions, or one for each."""

    def __init__(self, config: FusionConfig, *, split: bool, gated: bool) -> None:
        super().__init__()
        self.query = config.query
        readers = ("rgb", "heatmap") if config.query == "both" else (config.query,)
        names = readers if split else ("shared",)
        self.blocks = nn.ModuleDict({name: CrossBlock(config, gated=gated) for name in names})

    def forward(
        self, rgb: Float[Tensor, "B S D"], heatmap: Float[Tensor, "B S D"]
    ) -> tuple[Float[Tensor, "B S D"], Float[Tensor, "B S D"]]:
        """The new state of each stream; a stream that does not read keeps its own."""
        new_rgb = self._block("rgb")(rgb, heatmap) if self.query != "heatmap" else rgb
        new_heatmap = self._block("heatmap")(heatmap, rgb) if self.query != "rgb" else heatmap
        return new_rgb, new_heatmap

    def attention(
        self, rgb: Float[Tensor, "B S D"], heatmap: Float[Tensor, "B S D"]
    ) -> dict[str, Float[Tensor, "B heads S S"]]:
        """What each stream that reads attends to in the other, by that stream."""
        streams = {"rgb": (rgb, heatmap), "heatmap": (heatmap, rgb)}
        return {
            reader: self._block(reader).attention(*tokens)
            for reader, tokens in streams.items()
            if self.query in ("both", reader)
        }

    def _block(self, reader: str) -> "CrossBlock":
        block = self.blocks["shared" if "shared" in self.blocks else reader]
        assert isinstance(block, CrossBlock)
        return block


class CrossBlock(nn.Module):
    """Cross-attention from one stream's tokens to the other's, then an MLP, each with a residual.

    Source: arXiv:2312.00856, section 3. Differs: dropout, stochastic depth and the gate are choices. The gate is
    ``2 * sigmoid(linear(query, read))`` with the linear layer at zero, so that training starts at the published
    block and may close or double each feature that is read.
    Shapes: B clips, S query tokens, M value tokens, D feature width.

    Args:
        config: width, heads, mlp_ratio, dropout and drop_path.
        gated: has the gate.
    """

    def __init__(self, config: FusionConfig, *, gated: bool) -> None:
        super().__init__()
        width, hidden = config.width, max(1, round(config.width * config.mlp_ratio))
        self.heads = config.heads
        self.norm_query = nn.LayerNorm(width)
        self.norm_value = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = DropPath(config.drop_path)
        self.apply(init_linear)
        self.gate = nn.Linear(2 * width, width) if gated else None
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    def forward(self, x: Float[Tensor, "B S D"], other: Float[Tensor, "B M D"]) -> Float[Tensor, "B S D"]:
        """The stream ``x`` after it has read ``other``."""
        x = x + self.drop_path(self._read(self.norm_query(x), self.norm_value(other)))
        y: Tensor = self.dropout(F.gelu(self.expand(self.norm_mlp(x))))
        y = self.drop_path(self.dropout(self.contract(y)))
        return x + y

    def attention(self, x: Float[Tensor, "B S D"], other: Float[Tensor, "B M D"]) -> Float[Tensor, "B heads S M"]:
        """The weights by which each token of ``x`` reads those of ``other``; rows sum to 1.

        To look at: `forward` uses a kernel that never has them all in memory.
        """
        q, k = (
            rearrange(tokens, "b n (h d) -> b h n d", h=self.heads)
            for tokens in (self.query(self.norm_query(x)), self.key(self.norm_value(other)))
        )
        weights: Tensor = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)
        return weights

    def _read(self, x: Float[Tensor, "B S D"], other: Float[Tensor, "B M D"]) -> Float[Tensor, "B S D"]:
        q, k, v = (
            rearrange(tokens, "b n (h d) -> b h n d", h=self.heads)
            for tokens in (self.query(x), self.key(other), self.value(other))
        )
        y = F.scaled_dot_product_attention(q, k, v)  # B heads S D/heads
        read: Tensor = self.dropout(self.out(rearrange(y, "b h n d -> b n (h d)")))
        if self.gate is not None:
            read = read * 2 * torch.sigmoid(self.gate(torch.cat([x, read], dim=-1)))
        return read


class DropPath(nn.Module):
    """Drops a residual branch for whole clips while training, and scales the rest up (arXiv:1603.09382)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """x, or zero for a dropped clip."""
        if not self.training or self.probability == 0:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.probability
        return x * keep / (1 - self.probability)


class ConvMixer(nn.Module):
    """A linear map over the tokens, the same for every feature; it starts as the identity.

    Source: arXiv:2312.00856 (Conv1d with kernel 1 over 10 tokens).
    Raises:
        ConfigError: at forward, another number of tokens than it was made for.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(tokens, tokens, 1)
        nn.init.dirac_(self.conv.weight)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Mixed tokens."""
        if x.shape[1] != self.conv.in_channels:
            raise ConfigError(
                f"mixer 'conv1d' has weights for {self.conv.in_channels} tokens and takes no other number, got "
                f"{x.shape[1]} (model.fusion.mixer). Give clips of model.segments segments, or train with "
                "model.fusion.mixer=attention_pool or none."
            )
        mixed: Tensor = self.conv(x)
        return mixed


class AttentionPool(nn.Module):
    """One token: a weighted mean of all, weighted by what they hold; it starts as the plain mean.

    Source: attention-based pooling, arXiv:1802.04712, without its hidden layer.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        # Softmax over tokens cancels anything that all tokens share, so a bias or a norm's shift would never learn.
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.weigh = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.weigh.weight)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B 1 D"]:
        """The pooled token."""
        weights = self.attention(x).transpose(1, 2)  # B N 1
        pooled: Tensor = (weights * x).sum(dim=1, keepdim=True)
        return pooled

    def attention(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B 1 N"]:
        """The weight of each token; they sum to 1."""
        weights: Tensor = self.weigh(self.norm(x)).softmax(dim=1)
        return weights.transpose(1, 2)


MIXERS: dict[str, Callable[[int, int], nn.Module]] = {
    "conv1d": lambda width, tokens: ConvMixer(tokens),
    "none": lambda width, tokens: nn.Identity(),
    "attention_pool": lambda width, tokens: AttentionPool(width),
}
"""Mixer name -> builder from (token width, number of tokens)."""


def cross(config: FusionConfig, *, rgb_width: int, heatmap_width: int, segments: int) -> Fusion:
    """The published fusion: one set of weights for both directions."""
    return CrossFusion(config, rgb_width=rgb_width, heatmap_width=heatmap_width, segments=segments)


def cross_split(config: FusionConfig, *, rgb_width: int, heatmap_width: int, segments: int) -> Fusion:
    """The published fusion with separate weights for each direction."""
    return CrossFusion(config, rgb_width=rgb_width, heatmap_width=heatmap_width, segments=segments, split=True)


def gated(config: FusionConfig, *, rgb_width: int, heatmap_width: int, segments: int) -> Fusion:
    """The published fusion with a learned gate on what is read."""
    return CrossFusion(config, rgb_width=rgb_width, heatmap_width=heatmap_width, segments=segments, gated=True)


FUSIONS: dict[str, Callable[..., Fusion]] = {
    "cross": cross,
    "cross_split": cross_split,
    "gated": gated,
    "concat": ConcatFusion,
    "sum": SumFusion,
}
"""Fusion name -> builder ``(config, *, rgb_width, heatmap_width, segments) -> Fusion``."""


def _projection(in_width: int, width: int) -> nn.Module:
    if in_width == width:
        return nn.Identity()
    layer = nn.Linear(in_width, width)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _position(wanted: bool, segments: int, width: int) -> nn.Parameter | None:
    if not wanted:
        return None
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, segments, width), std=0.02))


def _add_position(tokens: Float[Tensor, "B S D"], position: nn.Parameter | None) -> Float[Tensor, "B S D"]:
    """Tokens with their position; a clip of another length gets the positions between the learned ones."""
    if position is None:
        return tokens
    if position.shape[1] == tokens.shape[1]:
        return tokens + position
    stretched = F.interpolate(position.transpose(1, 2), size=tokens.shape[1], mode="linear")
    return tokens + stretched.transpose(1, 2)
