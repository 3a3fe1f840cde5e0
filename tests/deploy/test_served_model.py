import ast
import base64
import inspect
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from nvidia.dali import fn, pipeline_def, types
from pandas import DataFrame
from PIL import Image

from deploy import served_model
from deploy.package import MODEL_FILE, WEIGHTS_FILE
from deploy.predict import Direct
from tests.deploy.small_model import CLASSES, COLOUR, noise, package, stage_settings
from vggcore.dense import dense_posteriors
from vggcore.schedule import Stage
from vggcore.view_average import turned_views


def served(folder: Path) -> Direct:
    return Direct(model=folder / MODEL_FILE, weights=folder / WEIGHTS_FILE)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, kind, **options)
    return target.getvalue()


def table(*pictures: bytes) -> DataFrame:
    return DataFrame({"image": [base64.b64encode(picture).decode() for picture in pictures]})


def scaled_less_mean(pixels: np.ndarray, width: int, height: int) -> torch.Tensor:
    small = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR), np.float32)
    return torch.from_numpy((small - COLOUR.mean.astype(np.float32)).transpose(2, 0, 1).copy())[None]


def deviation() -> torch.Tensor:
    return torch.from_numpy(COLOUR.deviation.astype(np.float32)).view(1, 3, 1, 1)


@pytest.mark.parametrize("head", ["paper", "compact"])
@pytest.mark.parametrize("net", ["A", "A-LRN", "B", "C", "D", "E"])
@torch.inference_mode()
def test_the_served_net_answers_as_the_trained_one_by_both_protocols(tmp_path, net, head):
    settings = stage_settings(net, head)
    trained = package(tmp_path / "dense", settings, protocol="dense", scales=(64, 100))
    package(tmp_path / "centre", settings, protocol="centre", scales=(72,))
    pixels = noise(1, height=90, width=131)

    dense = served(tmp_path / "dense").python_model.posteriors(pixels)
    centre = served(tmp_path / "centre").python_model.posteriors(pixels)

    wanted = []
    for width, height in ((93, 64), (146, 100)):   # 131 * 64/90 = 93.2 and 131 * 100/90 = 145.6
        images = scaled_less_mean(pixels, width, height) / deviation()
        wanted += [dense_posteriors(trained, images), dense_posteriors(trained, images.flip(3))]
    np.testing.assert_allclose(dense, torch.cat(wanted).mean(0).numpy(), atol=1e-5)
    images = scaled_less_mean(pixels, 105, 72)[:, :, 4:68, 20:84] / deviation()   # (72-64)//2 and (105-64)//2
    np.testing.assert_allclose(centre, torch.softmax(trained(images), 1)[0].numpy(), atol=1e-5)
    assert np.ptp(dense) > 1e-3   # a net that says 1/3 to everything would prove nothing


@pytest.mark.parametrize(("views", "number"), [("flips", 4), ("turns", 8)])
@pytest.mark.parametrize("protocol", ["centre", "dense"])
@torch.inference_mode()
def test_the_served_net_averages_over_mirrored_and_turned_views_as_the_evaluation_does(tmp_path, views, number, protocol):
    settings = stage_settings() | {"flip_vertical": True, "quarter_turns": True}
    trained = package(tmp_path, settings, protocol=protocol, scales=(72,), views=views)
    pixels = noise(1, height=90, width=131)

    found = served(tmp_path).python_model.posteriors(pixels)

    images = scaled_less_mean(pixels, 105, 72) / deviation()
    if protocol == "centre":
        images = images[:, :, 4:68, 20:84]
    flipped = [images, images.flip(3), images.flip(2), images.flip(2, 3)]
    each = (flipped + [one.transpose(2, 3) for one in flipped])[:number]
    expected = torch.cat([dense_posteriors(trained, one) for one in each]).mean(0)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    stage = Stage.model_validate_json(json.dumps(settings))
    assert json.loads((tmp_path / MODEL_FILE).read_text())["protocol"] == {
        "name": protocol,
        "scales": [72],
        "views": views,
        "turned": [list(one) for one in turned_views(views, protocol, stage)],
    }


def test_a_package_without_views_says_nothing_of_them(tmp_path):
    package(tmp_path, stage_settings())

    assert json.loads((tmp_path / MODEL_FILE).read_text())["protocol"] == {"name": "dense", "scales": [64, 80]}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("pool", ["average", "maximum", "both"])
@pytest.mark.parametrize("net", ["A", "A-LRN", "C"])
@torch.inference_mode()
def test_a_served_linear_head_pools_all_scales_of_the_whole_picture_and_its_mirror_image(tmp_path, net, pool, flip):
    features = {"groups": [1, 3], "pool": pool, "scales": [40, 70], "flip": flip}
    settings = stage_settings(net, "linear", features=features, fit="logistic", dropout=0.0)
    trained = package(tmp_path, settings, protocol="pooled", scales=(40, 70))
    pixels = noise(1, height=90, width=131)

    found = served(tmp_path).python_model.posteriors(pixels)

    values = []
    for width, height in ((58, 40), (102, 70)):   # 131 * 40/90 = 58.2 and 131 * 70/90 = 101.9
        images = scaled_less_mean(pixels, width, height) / deviation()
        pooled = trained.pooled(images)
        values.append((pooled + trained.pooled(images.flip(3))) / 2 if flip else pooled)
    wanted = torch.softmax(trained.classifier(torch.cat(values, 1)), 1)[0].numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.ptp(found) > 1e-3
    description = served(tmp_path).python_model.description
    assert description["protocol"] == {"name": "pooled", "scales": [40, 70], "flip": flip}
    kinds = [layer["kind"] for layer in description["layers"]]
    assert kinds.count("pool_places") == 2 and kinds[-2:] == ["pool_places", "linear"]


@torch.inference_mode()
def test_no_deviation_divides_unless_the_net_was_trained_so(tmp_path):
    trained = package(tmp_path, stage_settings(standardise=False), protocol="centre", scales=(64,))
    pixels = noise(2, height=64, width=64)

    found = served(tmp_path).python_model.posteriors(pixels)

    wanted = torch.softmax(trained(scaled_less_mean(pixels, 64, 64)), 1)[0].numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_table_names_the_best_class_and_lists_top_k_in_order(tmp_path):
    package(tmp_path, stage_settings())
    model = served(tmp_path)
    pictures = table(encoded(noise(1)), encoded(noise(2)[:70]))

    found = model.predict(pictures, {"top_k": 2})
    everything = model.predict(pictures, {"top_k": 99})

    assert list(found.columns) == ["class", "probability", "top"]
    for row, whole in zip(found.itertuples(), everything["top"], strict=True):
        posteriors = [place["probability"] for place in whole]
        assert posteriors == sorted(posteriors, reverse=True)
        assert sum(posteriors) == pytest.approx(1, abs=1e-6)
        assert {place["class"] for place in whole} == set(CLASSES)
        assert row.top == whole[:2]
        assert {"class": found["class"][row.Index], "probability": row.probability} == whole[0]


@pytest.mark.parametrize(
    ("height", "width", "scale", "wanted"),
    [(90, 131, 64, (64, 93)), (131, 90, 64, (93, 64)), (300, 300, 96, (96, 96)), (3, 4, 6, (6, 8)), (7, 1000, 64, (64, 9143)),
     (2, 3, 3, (3, 5))],
)  # fmt: skip
def test_sides_are_scaled_and_rounded_as_the_plan_of_views_does(height, width, scale, wanted):
    found = served_model.rescale(np.zeros((height, width, 3), np.uint8), scale)

    assert found.shape == (*wanted, 3)


@torch.inference_mode()
def test_a_net_that_learned_whole_pictures_is_served_them_squeezed_to_a_square(tmp_path):
    settings = stage_settings() | {"view": "whole"}
    trained = package(tmp_path, settings, protocol="centre", scales=(72,))
    pixels = noise(1, height=90, width=131)

    found = served(tmp_path).python_model.posteriors(pixels)

    squeezed = scaled_less_mean(pixels, 72, 72) / deviation()
    crop = settings["crop"]
    first = (72 - crop) // 2
    expected = trained(squeezed[:, :, first : first + crop, first : first + crop]).softmax(1)[0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def odd_pictures() -> dict[str, bytes]:
    pixels = noise(3)
    rgba = Image.fromarray(pixels)
    rgba.putalpha(Image.fromarray(noise(4)[:, :, 0]))
    grey16 = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = Image.fromarray(pixels).quantize(32)
    pictures = {
        "JPEG": (Image.fromarray(pixels), "JPEG", {"quality": 85}),
        "progressive": (Image.fromarray(pixels), "JPEG", {"progressive": True}),
        "grey JPEG": (Image.fromarray(pixels).convert("L"), "JPEG", {}),
        "CMYK JPEG": (Image.fromarray(pixels).convert("CMYK"), "JPEG", {}),
        "turned JPEG": (Image.fromarray(pixels), "JPEG", {"exif": turned}),
        "turned PNG": (Image.fromarray(pixels), "PNG", {"exif": turned}),
        "alpha": (rgba, "PNG", {}),
        "grey with alpha": (rgba.convert("LA"), "PNG", {}),
        "16-bit grey": (Image.fromarray(grey16), "PNG", {}),
        "one bit": (Image.fromarray(pixels).convert("1"), "PNG", {}),
        "palette": (palette, "PNG", {}),
        "palette with transparency": (palette, "PNG", {"transparency": bytes(range(32))}),
        "WebP": (Image.fromarray(pixels), "WEBP", {"lossless": True}),
        "TIFF": (Image.fromarray(pixels), "TIFF", {}),
        "BMP": (Image.fromarray(pixels), "BMP", {}),
    }
    found = {}
    for name, (image, kind, options) in pictures.items():
        target = io.BytesIO()
        image.save(target, kind, **options)
        found[name] = target.getvalue()
    return found


def test_odd_pictures_are_decoded_as_dali_decodes_them():
    pictures = odd_pictures()

    @pipeline_def(batch_size=len(pictures), num_threads=1, device_id=None)
    def graph():
        files = [np.frombuffer(picture, np.uint8) for picture in pictures.values()]
        return fn.decoders.image(fn.external_source(source=lambda: files, batch=True, dtype=types.UINT8), device="cpu")

    wanted = graph().run()[0]
    for place, (name, picture) in enumerate(pictures.items()):
        found = served_model.decode_picture(picture)

        np.testing.assert_array_equal(found, np.array(wanted[place]), err_msg=name)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("§§ no base64 §§", ["row 1", "not base64", "JPEG"]),
        ("data:image/png;base64,AAAA", ["row 1", "not base64", "data:image"]),
        ("", ["row 1", "not a picture", "0 bytes"]),
        (base64.b64encode(b"<html>404</html>").decode(), ["row 1", "not a picture", "16 bytes"]),
        (base64.b64encode(encoded(noise(1), "JPEG")[:900]).decode(), ["row 1", "not a whole picture", "truncated"]),
        (base64.b64encode(encoded(noise(1), "GIF")).decode(), ["row 1", "not a picture", "PNG"]),
        (base64.b64encode(encoded(noise(1)[:, :, 0].astype(np.float32), "TIFF")).decode(), ["row 1", "32-bit"]),
        (None, ["row 1", "NoneType", "base64"]),
        (7, ["row 1", "int", "base64"]),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line_that_names_the_row(tmp_path, image, words):
    package(tmp_path, stage_settings())
    good = base64.b64encode(encoded(noise(1))).decode()

    with pytest.raises(MlflowException) as caught:
        served(tmp_path).predict(DataFrame({"image": [good, image]}, dtype=object), {"top_k": 1})

    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"   # HTTP 400, without a stack trace
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_top_k_below_one_is_refused(tmp_path):
    package(tmp_path, stage_settings())

    with pytest.raises(MlflowException, match="top_k is 0, wanted 1 or more"):
        served(tmp_path).predict(table(encoded(noise(1))), {"top_k": 0})


def test_a_model_of_a_later_format_is_refused_by_name(tmp_path):
    package(tmp_path, stage_settings())
    path = tmp_path / MODEL_FILE
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))

    with pytest.raises(ValueError, match=r"format 2.*reads 1"):
        served(tmp_path)


def test_the_file_stands_alone_with_the_argument_names_that_mlflow_calls():
    tree = ast.parse(Path(served_model.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}

    outside = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names

    assert outside == {"mlflow", "numpy", "pandas", "PIL", "safetensors", "torch"}
    predict, load = served_model.VggModel.predict, served_model.VggModel.load_context
    assert list(inspect.signature(predict).parameters) == ["self", "context", "model_input", "params"]
    assert list(inspect.signature(load).parameters) == ["self", "context"]
    assert not predict.__annotations__
