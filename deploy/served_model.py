"""The served model: one standalone file that MLflow loads, which runs the net that model.json describes.

It travels with every model version and imports nothing of ours, so that a version loads where Vggrow is not installed.
In: a column `image`, the base64 text of an encoded picture, and the parameter `top_k`. Out: one row a picture with
`class`, `probability` (0..1) and `top`, a list of {"class", "probability"} from the most probable on.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="misc"

import base64
import binascii
import io
import json
import pathlib
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors.torch import load_file
from torch.nn import functional

FORMAT = 1                   # of model.json: rises when the meaning of a field changes
TOP_K = 5                    # the classes listed where `top_k` is not given
# What training's decoder (DALI) reads; Pillow knows more, one of which starts another program (EPS).
PICTURE_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "PPM", "JPEG2000", "WEBP")
WANTED_PICTURE = "a JPEG, PNG, BMP, TIFF, PNM, JPEG 2000 or WebP file"


class VggModel(mlflow.pyfunc.PythonModel):
    """A trained net with its classes, its pixel rules and its test protocol, as model.json states them."""

    # Else MLflow 3.17.2 warns at every load that predict has no type hints; they would drop the schema of `params`.
    _skip_type_hint_validation = True

    # MLflow calls both methods by exactly these argument names.
    def load_context(self, context):
        """Reads the artifacts `model` (model.json) and `weights` (model.safetensors)."""
        description = json.loads(pathlib.Path(context.artifacts["model"]).read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            found = description["format"]
            raise ValueError(f"model.json has format {found!r}, but served_model.py beside it reads {FORMAT}")
        self.description = description
        self.classes = description["classes"]
        self.weights = load_file(context.artifacts["weights"])

    def predict(self, context, model_input, params=None):
        """One row a picture. MlflowException (HTTP 400) that names the row for what is no base64 or no picture."""
        top_k = int((params or {}).get("top_k", TOP_K))
        if top_k < 1:
            raise bad_input(f"top_k is {top_k}, wanted 1 or more")
        rows = []
        for row, text in enumerate(model_input["image"]):
            try:
                pixels = decode_picture(decode_base64(text))
            except ValueError as error:
                raise bad_input(f"row {row}: {error}") from error
            posteriors = self.posteriors(pixels)
            top = [
                {"class": self.classes[place], "probability": float(posteriors[place])}
                for place in np.argsort(-posteriors, kind="stable")[:top_k]
            ]
            rows.append({**top[0], "top": top})
        return pd.DataFrame(rows, columns=["class", "probability", "top"])

    def posteriors(self, pixels: np.ndarray) -> np.ndarray:
        """Posteriors (classes,) float32 of a picture (h, w, 3) uint8 by the protocol of model.json (Sec. 3.2).

        "centre": the middle crop at each test scale Q. "dense": the whole picture, averaged with its mirror image.
        Soft-max posteriors are averaged over the test scales, and over further mirrored and turned views where the protocol
        lists them. "pooled": see pooled_posteriors.
        """
        protocol, layers = self.description["protocol"], self.description["layers"]
        if protocol["name"] == "pooled":
            return self.pooled_posteriors(pixels)
        total = np.zeros(len(self.classes), np.float64)
        for scale in protocol["scales"]:
            scaled = self.rescaled(pixels, scale)
            if protocol["name"] == "centre":
                images = normalise(centre_crop(scaled, self.description["crop"]), self.description)
            else:
                images = normalise(scaled, self.description)
            with torch.inference_mode():
                each = [run_layers(layers, self.weights, views).softmax(1) for views in turned_views(images, protocol)]
            total += torch.cat(each).double().mean(0).numpy()
        return (total / len(protocol["scales"])).astype(np.float32)

    def pooled_posteriors(self, pixels: np.ndarray) -> np.ndarray:
        """Posteriors (classes,) float32 of a linear layer on pooled values of the whole picture at all test scales Q.

        Each scale's values follow the last one's; with `flip` they are the mean of the picture's and its mirror image's.
        """
        protocol, layers = self.description["protocol"], self.description["layers"]
        at_scales = []
        with torch.inference_mode():
            for scale in protocol["scales"]:
                images = normalise(self.rescaled(pixels, scale), self.description)
                if protocol["flip"]:
                    images = torch.cat([images, images.flip(3)])
                at_scales.append(pooled_values(layers[:-1], self.weights, images).mean(0))
            weight, bias = (self.weights[layers[-1][name]] for name in ("weight", "bias"))
            return functional.linear(torch.cat(at_scales), weight, bias).softmax(0).numpy()

    def rescaled(self, pixels: np.ndarray, scale: int) -> np.ndarray:
        """The whole picture at a test scale, as training saw it."""
        return rescale(pixels, scale, squeeze=self.description.get("view") == "whole")


def turned_views(images: torch.Tensor, protocol: dict[str, Any]) -> list[torch.Tensor]:
    """The views of a picture (1, 3, h, w) that a protocol asks for, in batches of one size: upright ones, then lying ones.

    `turned` lists each as [mirrored, quarter turns]; without it "dense" has the picture and its mirror image, "centre" it
    alone.
    """
    usual = [[False, 0], [True, 0]] if protocol["name"] == "dense" else [[False, 0]]
    batches: list[list[torch.Tensor]] = [[], []]
    for mirrored, turns in protocol.get("turned", usual):
        batches[turns % 2].append(torch.rot90(images.flip(3) if mirrored else images, turns, (2, 3)))
    return [torch.cat(batch) for batch in batches if batch]


def run_layers(layers: list[dict[str, Any]], weights: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Logits (N, classes) of images (N, 3, H, W), no side below the crop, by a flat list of layers.

    Linear layers run at every place of the feature map, the first on windows of `window` places a side, and the score
    map is averaged (Sec. 3.2); an image of the crop's own size has one place, and the logits are the trained net's.
    """
    values = images
    for layer in layers:
        values = run_layer(layer, weights, values)
    return values.mean((2, 3))


def pooled_values(layers: list[dict[str, Any]], weights: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """(N, F): what each layer "pool_places" pools over all places, in order; averages before maxima."""
    values, pooled = images, []
    for layer in layers:
        if layer["kind"] != "pool_places":
            values = run_layer(layer, weights, values)
            continue
        if layer["how"] != "maximum":
            pooled.append(values.mean((2, 3)))
        if layer["how"] != "average":
            pooled.append(values.amax((2, 3)))
    return torch.cat(pooled, 1)


def run_layer(layer: dict[str, Any], weights: dict[str, torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    """Values (N, C, H, W) after one layer."""
    match layer["kind"]:
        case "conv":
            weight, bias = weights[layer["weight"]], weights[layer["bias"]]
            values = functional.conv2d(values, weight, bias, padding=layer["padding"])
        case "relu":
            values = functional.relu(values)
        case "lrn":
            size, alpha, beta, k = (layer[name] for name in ("size", "alpha", "beta", "k"))
            values = functional.local_response_norm(values, size, alpha, beta, k)
        case "max_pool":
            values = functional.max_pool2d(values, layer["window"], layer["stride"])
        case "average_pool":
            values = functional.avg_pool2d(values, layer["window"], stride=1)
        case "linear":
            places = [side - layer["window"] + 1 for side in values.shape[2:]]
            windows = functional.unfold(values, layer["window"]).transpose(1, 2)   # (N, places, F)
            scores = functional.linear(windows, weights[layer["weight"]], weights[layer["bias"]])
            values = scores.transpose(1, 2).unflatten(2, places)
        case kind:
            raise ValueError(f"model.json: unknown kind of layer {kind!r}; served_model.py is older than the model")
    return values


def decode_base64(text: str) -> bytes:
    """The bytes that `text` stands for; white space is left out. ValueError, one line, for anything else."""
    if not isinstance(text, str):
        raise ValueError(f"found {type(text).__name__}, wanted the base64 text of an encoded picture")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"not base64 ({text[:20]!r}...); send the base64 text of {WANTED_PICTURE}") from error


def decode_picture(encoded: bytes) -> np.ndarray:
    """Pixels (h, w, 3) uint8 RGB, turned upright by EXIF. ValueError, one line, for what is no whole picture.

    As training's decoder (DALI 2.4.0): alpha is dropped, grey is repeated, CMYK becomes RGB, 16-bit grey v becomes
    round(v * 255 / 65535). 16-bit colour is cut to its high byte by Pillow where DALI rounds: one level in a quarter
    of the values.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=PICTURE_FORMATS)
        image.load()
    except UnidentifiedImageError as error:
        raise ValueError(f"not a picture that Pillow decodes ({len(encoded)} bytes); send {WANTED_PICTURE}") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"not a whole picture ({reason}; {len(encoded)} bytes); send {WANTED_PICTURE}") from error
    if image.mode in ("I", "F"):
        raise ValueError(f"a picture of 32-bit values (mode {image.mode}); send one with 8 or 16 bits a channel")
    image.info.pop("transparency", None)
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        grey = (np.asarray(upright).astype(np.uint32) * 255 + 32767) // 65535
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    return np.asarray(upright.convert("RGB"))


def rescale(pixels: np.ndarray, scale: int, *, squeeze: bool = False) -> np.ndarray:
    """The picture with its shorter side at `scale` pixels, uint8; bilinear, antialiased where it shrinks.

    squeeze: both sides at `scale`, aspect not kept, for nets that learned whole pictures so.
    """
    height, width, _ = pixels.shape
    short = min(height, width)
    size = [scale if squeeze else (2 * side * scale + short) // (2 * short) for side in (width, height)]
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))


def centre_crop(pixels: np.ndarray, crop: int) -> np.ndarray:
    """The middle crop x crop pixels; an odd rest goes to the right and the bottom."""
    top, left = ((side - crop) // 2 for side in pixels.shape[:2])
    return pixels[top : top + crop, left : left + crop]


def normalise(pixels: np.ndarray, description: dict[str, Any]) -> torch.Tensor:
    """Images (1, 3, h, w) float32: 0..255 less the training set's mean, over its deviation where model.json has one."""
    values = pixels.astype(np.float32) - np.asarray(description["mean"], np.float32)
    if description["deviation"] is not None:
        values /= np.asarray(description["deviation"], np.float32)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))[None]


def bad_input(message: str) -> MlflowException:
    """What the caller can mend: HTTP 400 from a server, without a stack trace."""
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


mlflow.models.set_model(VggModel())
