"""Backbones of timm by name, as they are; its ResNets also with another stem, norm, pooling or width.

timm is imported when a network is built or checked, for it takes seconds.
"""

import difflib
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from asge_zoo.backbones.base import Backbone, Cutting
from asge_zoo.errors import SpecError
from asge_zoo.ops.norm import ChannelAffine, LayerNorm, Norm
from asge_zoo.ops.pooling import RMS, Pooling
from asge_zoo.ops.transfer import Transfer
from asge_zoo.registry import register

STAGE_CHANNELS = (64, 128, 256, 512)  # of timm's ResNets, at width 1, before a bottleneck's expansion
NORMS = (_BatchNorm, nn.GroupNorm)
STEM_POOL = 2  # pixels a side that the stem's pooling makes one


@register
class Timm(Backbone):
    """A convolutional network of timm's, without its classifier, from random weights.

    Goodness is read behind each unit's own norm and activation, before it is pooled. `stem`, `norm`, `pooling` and
    `width` are for ResNets alone.
    """

    kind: Literal["timm"] = "timm"
    name: str = Field(default="resnet18", description="timm's name of it, as `timm.list_models()` has them.")
    cut: Literal["conv", "block", "stage"] = Field(
        default="conv", description="What learns alone: each convolution, each residual block, or each stage."
    )
    width: PositiveFloat = Field(default=1.0, le=64, description="Multiplies the channels of every stage but the stem.")
    stem: Literal["imagenet", "cifar"] = Field(
        default="imagenet", description="timm's own, or one 3×3 convolution of stride 1 without pooling."
    )
    norm: Literal["keep", "spec"] = Field(
        default="keep",
        description="Batch norm behind every convolution, or none and the spec's norm behind every unit's goodness.",
    )
    norm_weight: PositiveFloat = Field(
        default=1.0, description="What its norms' weights start at; small ones keep the first losses small, as in VGG."
    )
    pooling: Literal["keep", "spec"] = Field(
        default="keep", description="The stem's max pooling, or the spec's pooling over 2×2 pixels."
    )

    def check(self, pooling: Pooling, norm: Norm) -> None:
        import timm

        if not timm.is_model(self.name):
            close = difflib.get_close_matches(self.name, timm.list_models(), n=1)
            hint = f"did you mean '{close[0]}'?" if close else "`timm.list_models()` lists them"
            raise SpecError(f"backbone.name: timm has no model '{self.name[:60]}'; {hint}")
        changed = [*self.replaced(), *(["width"] if self.width != 1 else [])]
        if changed and not timm.models.is_model_in_modules(self.name, ["resnet"]):
            raise SpecError(
                f"backbone.{changed[0]}: is for timm's ResNets, and '{self.name}' is none of them; leave it out"
            )
        if self.pooling == "spec" and self.stem == "cifar":
            raise SpecError("backbone.pooling: stem 'cifar' does not pool; leave it out, or take stem 'imagenet'")
        if self.norm == "spec" and self.norm_weight != 1:
            raise SpecError("backbone.norm_weight: with norm 'spec' there are no such norms; leave it out")
        for field, component, default in (("norm", norm, LayerNorm()), ("pooling", pooling, RMS())):
            if getattr(self, field) == "keep" and component != default:
                raise SpecError(
                    f"{field}.kind: '{component.kind}' with its options would not be used, for backbone.{field} is "
                    f"'keep'; set backbone.{field} to 'spec', or leave {field} out"
                )

    def build(self, in_channels: int, *, pooling: Pooling, norm: Norm) -> nn.Module:
        import timm

        try:
            model: Any = timm.create_model(self.name, in_chans=in_channels, **self.arguments())
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise SpecError(
                f"backbone.name: timm can't make '{self.name}' so ({reason}); change its options"
            ) from error
        _start_norms(model, self.norm_weight)
        if self.stem == "cifar":
            _replace_stem(model, in_channels)
        if (self.norm, self.pooling) == ("keep", "keep"):
            return model
        if not isinstance(model.conv1, nn.Conv2d) or any(True for _ in model.maxpool.parameters()):
            raise SpecError(
                f"backbone.{self.replaced()[-1]}: 'spec' needs a stem of one convolution, and '{self.name}' has more; "
                f"set backbone.stem to 'cifar', or leave it out"
            )
        pool = pooling.build(STEM_POOL) if self.pooling == "spec" else model.maxpool
        model.maxpool = _transfer(norm if self.norm == "spec" else None, model.conv1.out_channels, pool)
        if self.norm == "spec":
            _replace_norms(model, norm)
        return model

    def arguments(self) -> dict[str, Any]:
        """What `timm.create_model` takes beside the name and the images' channels."""
        if self.width == 1:
            return {"num_classes": 0}
        return {"num_classes": 0, "channels": [max(1, round(c * self.width)) for c in STAGE_CHANNELS]}

    def cutting(self, module: nn.Module) -> Cutting:
        info: Any = getattr(module, "feature_info", ())
        return Cutting(self.cut, tuple(stage["module"] for stage in info))

    def min_size(self) -> int:
        """So that no convolution of stride 2 meets a single pixel, where torch's bfloat16 gradients are wrong (CPU)."""
        return 8 if self.stem == "cifar" else 32

    def replaced(self) -> list[str]:
        """Of `stem`, `norm` and `pooling`, those that are not timm's own."""
        own = {"stem": "imagenet", "norm": "keep", "pooling": "keep"}
        return [field for field, value in own.items() if getattr(self, field) != value]


def _start_norms(model: nn.Module, weight: float) -> None:
    """Not at timm's zeros in a residual branch's last norm: its convolutions would get no local gradient from them."""
    for module in model.modules():
        if isinstance(module, NORMS) and module.weight is not None:
            nn.init.constant_(module.weight, weight)


def _replace_stem(model: Any, in_channels: int) -> None:
    """One 3×3 convolution of stride 1, drawn as timm draws them, in the place of the stem's, and no pooling."""
    *_, last = (module for module in model.conv1.modules() if isinstance(module, nn.Conv2d))
    model.conv1 = nn.Conv2d(in_channels, last.out_channels, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()


def _replace_norms(model: Any, norm: Norm) -> None:
    """No norm within units, a bias in its place; and the spec's norm behind each activation of the blocks."""
    blocks = [block for name, stage in model.named_children() if name.startswith("layer") for block in stage]
    shortcuts = [block.downsample for block in blocks if block.downsample is not None]
    for part in (model, *blocks, *shortcuts):
        convolutions = [child for child in part.children() if isinstance(child, nn.Conv2d)]
        for convolution in convolutions:
            convolution.bias = nn.Parameter(torch.zeros(convolution.out_channels))
        for name, child in list(part.named_children()):
            if isinstance(child, NORMS):
                setattr(part, name, nn.Identity())
    acts = [
        (block, f"act{number}", getattr(block, f"conv{number}").out_channels)
        for block in blocks
        for number in (1, 2, 3)
        if hasattr(block, f"act{number}")
    ]
    for block, name, channels in acts:
        passed_on = _transfer(norm, channels) if (block, name) != acts[-1][:2] else _transfer(norm)
        setattr(block, name, nn.Sequential(getattr(block, name), passed_on))


def _transfer(norm: Norm | None, channels: int | None = None, pooling: nn.Module | None = None) -> nn.Module:
    """What stands behind a unit's activation; with `channels` the next unit's affine part, where the norm has one."""
    transfer = Transfer(pooling=pooling, dropout=0.0, norm=norm.build() if norm else nn.Identity())
    if norm is None or not norm.affine or channels is None:
        return transfer
    return nn.Sequential(transfer, ChannelAffine(channels))
