"""VGG8 and VGG11 without fully connected layers.

VGG8's widths and pools follow exactly from the paper's Table 3 (parameters and stored activations);
VGG11's are derived by analogy, from vgg11b of Nøkland & Eidnes (2019).
"""

from collections import OrderedDict
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn

from asge_zoo.backbones.base import Backbone
from asge_zoo.ops.norm import ChannelAffine, Norm
from asge_zoo.ops.pooling import Pooling
from asge_zoo.ops.transfer import Transfer
from asge_zoo.registry import register

POOL_SIZE = 2


class VGG(Backbone):
    """What the VGGs share. `layout` gives channels at width 1, and whether the layer is pooled."""

    layout: ClassVar[tuple[tuple[int, bool], ...]]

    width: PositiveFloat = Field(default=1.0, le=64, description="Multiplies every layer's channels.")
    stem_stride: PositiveInt = Field(
        default=1, le=4, description="Stride of the first convolution, for large images (the paper: not known)."
    )
    extra_conv: bool = Field(
        default=False, description="A copy of the last convolution in the classifier's place: the network of Best."
    )
    bias: bool = Field(default=True, description="Whether convolutions have a bias (the paper: not known).")
    init: Literal["default", "kaiming"] = Field(
        default="default", description="Convolution weights: PyTorch's default, or Kaiming normal for ReLU."
    )
    dropout: NonNegativeFloat = Field(
        default=0.0, lt=1, description="Dropout between pooling and norm (the paper: not known)."
    )

    def build(self, in_channels: int, *, pooling: Pooling, norm: Norm) -> nn.Module:
        layout = [*self.layout, (self.layout[-1][0], False)] if self.extra_conv else self.layout
        layers = OrderedDict[str, nn.Module]()
        entering = in_channels
        for i, (channels, pool) in enumerate(layout, start=1):
            leaving = max(1, round(channels * self.width))
            if norm.affine and i > 1:
                layers[f"affine{i}"] = ChannelAffine(entering)
            layers[f"conv{i}"] = self._conv(entering, leaving, stride=self.stem_stride if i == 1 else 1)
            layers[f"relu{i}"] = nn.ReLU()
            layers[f"transfer{i}"] = Transfer(
                pooling=pooling.build(POOL_SIZE) if pool else None, dropout=self.dropout, norm=norm.build()
            )
            entering = leaving
        return nn.Sequential(layers)

    def _conv(self, entering: int, leaving: int, *, stride: int) -> nn.Conv2d:
        conv = nn.Conv2d(entering, leaving, kernel_size=3, stride=stride, padding=1, bias=self.bias)
        if self.init == "kaiming":
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        return conv

    def min_size(self) -> int:
        return self.stem_stride * POOL_SIZE ** sum(pool for _, pool in self.layout)


@register
class VGG8(VGG):
    """Seven convolutions: 128, 256 P, 256, 512 P, 512 P, 512 P, 512."""

    kind: Literal["vgg8"] = "vgg8"
    layout = (
        (128, False),
        (256, True),
        (256, False),
        (512, True),
        (512, True),
        (512, True),
        (512, False),
    )


@register
class VGG11(VGG):
    """Ten convolutions: 128, 128, 128, 256 P, 256, 512 P, 512, 512 P, 512 P, 512."""

    kind: Literal["vgg11"] = "vgg11"
    layout = (
        (128, False),
        (128, False),
        (128, False),
        (256, True),
        (256, False),
        (512, True),
        (512, False),
        (512, True),
        (512, True),
        (512, False),
    )
