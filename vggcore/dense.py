"""Dense evaluation: the FC layers as convs over the whole uncropped picture (Sec. 3.2)."""

import torch
from torch import Tensor
from torch.nn import functional

from vggcore.nets import Vgg


def dense_logits(net: Vgg, images: Tensor) -> Tensor:
    """The score map: the logits of `net` for every crop of the feature map's grid, 32 pixels apart.

    images (N, 3, H, W), no side below the crop -> (N, classes, h, w), h and w being H/32 and W/32 rounded down, less
    crop/32, plus 1; (1, 1) at the crop's size, where the logits are forward's. `net` must be in eval mode.

    The first FC layer, a 7x7 conv at crop 224, is written as the layer itself on the feature map's 7x7 windows, the
    others, 1x1 convs, as the layers themselves on each place: the same sums, and no weight is copied. The compact head
    sees each window's average.
    """
    assert not net.training, "dense evaluation is for a net in eval mode: call net.eval() first"
    features: Tensor = net.features(images)    # (N, K, H, W)
    side, height, width = net.map_side, features.shape[2], features.shape[3]
    assert min(height, width) >= side, f"pictures of {tuple(images.shape[2:])} pixels are smaller than the net's crop"
    if net.head == "paper":
        windows = functional.unfold(features, side)                            # (N, K*side*side, h*w)
    else:
        windows = functional.avg_pool2d(features, side, stride=1).flatten(2)   # (N, K, h*w)
    scores: Tensor = net.classifier(windows.transpose(1, 2).flatten(0, 1))     # (N*h*w, classes)
    return scores.view(len(images), height - side + 1, width - side + 1, -1).permute(0, 3, 1, 2)


def dense_units(net: Vgg, images: Tensor) -> Tensor:
    """The last hidden FC layer's units, averaged over all places of the picture (Appendix B): images as in dense_logits.

    (N, 3, H, W) -> (N, units of FC-2), float32, 4,096 at the paper's width; `net` has the paper's head.
    """
    assert net.head == "paper" and not net.training
    windows = functional.unfold(net.features(images), net.map_side).transpose(1, 2)     # (N, places, K*side*side)
    units: Tensor = net.classifier[:-1](windows.flatten(0, 1))
    return units.float().view(len(images), -1, units.shape[1]).mean(1)


def dense_posteriors(net: Vgg, images: Tensor) -> Tensor:
    """The soft-max of the spatially averaged score map (Sec. 3.2): images as in dense_logits -> (N, classes) float32.

    The horizontally flipped picture is the caller's to add: the mean of the two posteriors is the protocol's.
    """
    return torch.softmax(dense_logits(net, images).float().mean(dim=(2, 3)), dim=1)
