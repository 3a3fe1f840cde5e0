import os

import pytest
from mlflow import MlflowClient
from PIL import Image

from deploy.predict import check_classes, open_model
from tests.deploy.mlflow_server import free_port
from tests.deploy.small_model import CLASSES, STAGE_KEY, log_small, noise, write_stage
from vggcore.errors import DatasetError, RegistryError, TrackingError


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_answers_alike_under_every_name_it_has(logged, elsewhere):
    names = [
        "models:/small@champion",
        "models:/small/1",
        logged.model_uri,
        f"runs:/{logged.run_id}",
        f"runs:/{logged.run_id}/model",
        str(logged.package),
        str(logged.model_folder),
    ]

    found = {name: open_model(name, store=logged.store, tracking=logged.tracking) for name in names}

    wanted = found[names[0]].predict(logged.pictures, top_k=2)
    assert [answer["path"] for answer in wanted] == [str(path) for path in logged.pictures]
    assert all(len(answer["top"]) == 2 for answer in wanted)
    assert len({answer["top"][0]["probability"] for answer in wanted}) == 3   # the pictures are not mixed up
    for predictor in found.values():
        assert predictor.classes == CLASSES
        assert predictor.predict(logged.pictures, top_k=2) == wanted
    assert list(elsewhere.iterdir()) == []   # no mlflow.db, no mlruns


def test_a_stage_is_opened_by_name_or_key_dense_at_its_own_test_scales(logged, elsewhere):
    by_name = open_model("A-72", store=logged.store, tracking=logged.tracking)
    by_key = open_model(STAGE_KEY, store=logged.store, tracking=logged.tracking)

    assert by_name.predict(logged.pictures) == by_key.predict(logged.pictures)
    assert by_name.description["protocol"] == {"name": "dense", "scales": [64, 72, 81]}   # 72 - 9 is below the crop
    package = open_model(str(logged.package), store=logged.store, tracking=logged.tracking)
    assert by_name.predict(logged.pictures) != package.predict(logged.pictures)   # that is dense at 64 and 80


def test_of_two_stages_with_one_name_the_newest_is_taken_and_said(tmp_path, caplog):
    for number, key in enumerate(("a" * 16, "b" * 16)):
        write_stage(tmp_path, key=key)
        os.utime(tmp_path / "stages" / key / "result.json", (number, number))

    found = open_model("A-72", store=tmp_path, tracking="sqlite:///unused.db")

    assert found.description["lineage"]["stage_key"] == "b" * 16
    assert "2 finished" in caplog.text
    assert "a" * 16 in caplog.text


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("models:/smal@champion", ["'smal'", "did you mean 'small'"]),
        ("models:/small@challenger", ["no alias 'challenger'", "'champion' (version 1)", "versions: 1"]),
        ("models:/small/7", ["no version '7'", "versions: 1"]),
        ("models:/small", ["neither alias nor version", "@champion"]),
        ("models:small@champion", ["not a model's address", "models:/name@alias"]),
        (f"models:/m-{'0' * 32}", ["cannot be fetched"]),
        (f"runs:/{'0' * 32}", ["no run", "0" * 32]),
        ("runs:/RUN/absent", ["cannot be fetched"]),
        ("A-27", ["no such model", "did you mean 'A-72'"]),
        ("nowhere/at/all", ["no such model", "'A-72'"]),
        ("EMPTY", ["a folder without model.json or MLmodel"]),
        ("FILE", ["a file, wanted", "models:/name@champion"]),
        ("BROKEN", ["model.safetensors", "missing"]),
    ],
)
def test_a_model_that_is_not_there_is_refused_in_one_line_with_what_there_is(logged, elsewhere, model, words):
    (elsewhere / "EMPTY").mkdir()
    (elsewhere / "FILE").write_text("x")
    (elsewhere / "BROKEN").mkdir()
    (elsewhere / "BROKEN" / "model.json").write_text("{}")
    name = model.replace("RUN", logged.run_id)

    with pytest.raises(RegistryError) as caught:
        open_model(name, store=logged.store, tracking=logged.tracking)

    message = str(caught.value)
    assert message.startswith(name.partition("@")[0].partition("/m-")[0])
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_store_without_a_finished_stage_says_what_a_model_may_be(tmp_path):
    with pytest.raises(RegistryError, match=r"no such model; wanted models:/name@alias.*none finished"):
        open_model("A-72", store=tmp_path, tracking="sqlite:///unused.db")


def test_a_tracking_server_that_is_down_is_said_but_not_asked_for_a_folder(logged):
    down = f"http://127.0.0.1:{free_port()}"

    with pytest.raises(TrackingError, match="no MLflow server answers"):
        open_model("models:/small@champion", store=logged.store, tracking=down)
    found = open_model(str(logged.package), store=logged.store, tracking=down)

    assert found.classes == CLASSES


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("page.jpg", b"<html>404</html>", "not a picture"),
        ("empty.png", b"", "0 bytes"),
        ("absent.png", None, "cannot be read"),
        ("folder", "folder", "cannot be read"),
    ],
)
def test_one_file_that_is_no_picture_is_named_and_nothing_is_answered(logged, elsewhere, name, content, words):
    path = elsewhere / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    predictor = open_model(str(logged.package), store=logged.store, tracking=logged.tracking)

    with pytest.raises(DatasetError, match=words) as caught:
        predictor.predict([*logged.pictures, path])

    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_more_pictures_than_are_held_at_once_come_back_in_their_order(logged, elsewhere):
    paths = []
    for number in range(19):
        paths.append(elsewhere / f"{number}.png")
        Image.fromarray(noise(number, 64, 64)).save(paths[-1])
    predictor = open_model(str(logged.package), store=logged.store, tracking=logged.tracking)

    together = predictor.predict(paths, top_k=1)

    assert [answer["path"] for answer in together] == [str(path) for path in paths]
    assert together[17:] == predictor.predict(paths[17:], top_k=1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (("brick", "coffee"), "'grass' has no pictures; expected pictures of each of its classes"),
        (("brick", "moss"), "'coffee', 'grass' have no pictures; the model does not know 'moss'"),
        (("brick", "coffee", "grass", "rust"), "does not know 'rust'"),
        (("brick", "coffee", "moss"), "'grass' has no pictures; the model does not know 'moss'"),
    ],
)
def test_pictures_of_other_classes_than_the_models_are_refused_with_the_difference(data, words):
    with pytest.raises(DatasetError, match=words):
        check_classes(CLASSES, data)


def test_pictures_of_the_models_classes_are_welcome_in_any_order():
    check_classes(CLASSES, list(CLASSES))
    check_classes(CLASSES, ("coffee", "brick", "grass"))


def test_the_whole_way_goes_over_a_real_server_too(mlflow_server, tmp_path, pictures, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    logged = log_small(tmp_path / "store", mlflow_server, pictures)
    found = open_model("models:/small@champion", store=logged.store, tracking=mlflow_server)

    package = open_model(str(logged.package), store=logged.store, tracking=mlflow_server)
    assert found.predict(pictures) == package.predict(pictures)
    assert MlflowClient(mlflow_server).get_run(logged.run_id).info.status == "FINISHED"
    with pytest.raises(RegistryError, match="no alias 'challenger'"):
        open_model("models:/small@challenger", store=logged.store, tracking=mlflow_server)
    assert list((tmp_path / "elsewhere").iterdir()) == []
