"""A net cut after the last layer that features need, and their values for a batch of pictures."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from training.features.spec import FeatureSpec
from vggcore.dense import dense_units
from vggcore.errors import DeviceError
from vggcore.nets import build_net

UNUSED_CLASSES = 2      # of the last layer, which is not asked


class FeatureNet:
    """The net of a spec with its weights, on a device, in the spec's precision."""

    def __init__(self, spec: FeatureSpec, tensors: Mapping[str, Tensor], device: str) -> None:
        """tensors: those of used_tensors, float32 under torchvision's names. device: "cpu" or "cuda"."""
        self.spec, self.device = spec, torch.device(device)
        if spec.pooled is not None:
            net = build_net(spec.net, classes=UNUSED_CLASSES, width=spec.width, head="linear", features=spec.pooled)
        else:
            assert spec.crop is not None, "FC features have the side at which FC-1 fits"
            net = build_net(spec.net, classes=UNUSED_CLASSES, width=spec.width, crop=spec.crop)
        net.classifier[-1] = nn.Identity()
        net.load_state_dict(dict(tensors))
        self.dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
        self.net = net.to(self.device, self.dtype).eval()
        net.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def values(self, images: Sequence[Tensor]) -> Tensor:
        """images: (n, 3, h, w) float32 less the mean at each scale -> (n, F) float32 on the CPU."""
        at_scales = [self.at_scale(one) for one in images]
        if self.spec.pooled is not None:
            return torch.cat(at_scales, 1).cpu()
        mean = torch.stack(at_scales).mean(0)
        return nn.functional.normalize(mean, dim=1).cpu()

    def at_scale(self, images: Tensor) -> Tensor:
        """The values of one scale; with flip the mean of the picture's and its mirror image's."""
        own = self.once(images)
        return (own + self.once(images.flip(3))) / 2 if self.spec.flip else own

    def once(self, images: Tensor) -> Tensor:
        """The values of images as they are."""
        laid_out = images.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)
        return self.net.pooled(laid_out) if self.spec.pooled is not None else dense_units(self.net, laid_out)


def has_bf16(device: str) -> bool:
    """Whether the hardware multiplies bfloat16 itself, by torch's own checks; elsewhere it is slower than float32."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))      # the last: ARM's


def set_up_device(device: str, precision: str) -> None:
    """DeviceError without the GPU asked for; the numeric choices that a spec's precision stands for."""
    if not device.startswith("cuda"):
        return
    if not torch.cuda.is_available():
        raise DeviceError("--device cuda: torch finds no GPU on this machine; use --device cpu")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
