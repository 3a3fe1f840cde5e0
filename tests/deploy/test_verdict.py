"""What is said of a result that is not worth having, on made-up posteriors."""

import numpy as np
import pytest

from deploy.last_words import what_to_try
from deploy.verdict import beside_parents, verdict
from deploy.yardsticks import Measured, Yardstick, Yardsticks
from training.store import Store
from vggcore.schedule import Stage
from vggcore.whole_file import write_json


def measured(right: list[float], *, each: int = 40) -> Measured:
    """A net that is right on these shares of the classes, each with `each` test pictures; wrong ones get the next class."""
    classes = len(right)
    labels = np.repeat(np.arange(classes), each)
    rows = []
    for label, share in enumerate(right):
        hits = round(share * each)
        rows += [np.eye(classes)[label]] * hits + [np.eye(classes)[(label + 1) % classes]] * (each - hits)
    return Measured("A-64", tuple(f"{place:03}.png" for place in range(len(labels))), labels, np.array(rows))


def beside(net: Measured, name: str = "logistic regression") -> Yardsticks:
    """A plain classifier that says what `net` says."""
    said = tuple(int(one) for one in net.posteriors.argmax(axis=1))
    row = Yardstick(name, "", 0.0, 0.0, None, said, 0.0)
    return Yardsticks(1, 1, len(said), net.paths, tuple(net.labels.tolist()), (row,))


def test_a_good_result_is_left_alone():
    good = measured([0.9, 0.9])

    assert verdict(good, None) == []
    assert verdict(good, beside(measured([0.7, 0.8]))) == []
    assert verdict(good, beside(good)) == []


@pytest.mark.parametrize("right", [[1.0, 0.0], [0.5, 0.5], [0.7, 0.35], [1.0, 0.0, 0.0]])
def test_a_net_that_names_one_class_or_guesses_is_said_to_be_no_better_than_chance(right):
    (sentence,) = verdict(measured(right), None)

    assert sentence.startswith("A-64 is not shown to be better than chance: balanced accuracy")
    assert f"chance is {100 / len(right):.1f} %" in sentence


def test_a_high_accuracy_on_uneven_classes_can_be_chance_all_the_same():
    net = measured([1.0, 0.0])
    keep = np.concatenate([np.arange(40), np.arange(40, 42)])      # 40 of one class, 2 of the other: 95 % right
    uneven = Measured(net.name, tuple(net.paths[place] for place in keep), net.labels[keep], net.posteriors[keep])

    assert len(verdict(uneven, None)) == 1


def test_a_result_below_logistic_regression_on_pixels_is_named_with_the_interval():
    net = measured([0.75, 0.75])

    (sentence,) = verdict(net, beside(measured([0.95, 1.0])))
    (close,) = verdict(net, beside(measured([0.8, 0.75])))

    assert "A-64 is below logistic regression on pixels: balanced accuracy 75.0 against 97.5 %" in sentence
    assert "a difference of -22.5" in sentence and "apart" not in sentence
    assert "80 pictures do not tell the two apart" in close


def test_other_classifiers_and_other_pictures_say_nothing():
    net = measured([0.75, 0.75])
    strangers = Measured("x", tuple(f"other/{path}" for path in net.paths), net.labels, measured([1.0, 1.0]).posteriors)

    assert verdict(net, beside(measured([1.0, 1.0]), name="random forest")) == []
    assert verdict(net, beside(strangers)) == []


def test_what_to_try_names_the_next_command(tmp_path):
    assert what_to_try(tmp_path / "my pets", False, [], "vggrow", "") == (
        "try: vggrow weights import keras/vgg16_notop, then"
        f" vggrow init '{tmp_path}/my pets' --from weights:keras/vgg16_notop --out NEW.toml"
    )
    assert what_to_try(tmp_path, False, ["mine"], "vggrow", " --store s").startswith("try: vggrow init")
    assert 'init_from = "weights:mine"' in what_to_try(None, False, ["mine"], "vggrow", "")
    assert "labels" in what_to_try(tmp_path, True, ["mine"], "vggrow", "")


def said_of(tmp_path, parent: tuple[float, float | None], child: tuple[float, float | None], **changes) -> list[str]:
    """What is said of D-96 from A-96, each with its top-1 accuracy and loss on val, of 400 pictures and two classes."""
    store, keys = Store(tmp_path), {"A-96": "a" * 16, "D-96": "d" * 16}
    for name, (top1, loss) in (("A-96", parent), ("D-96", child)):
        weights = {"last": {"file": "w", "digest": "0", "val_top1_accuracy": top1, "val_loss": loss}}
        write_json(store.stage(keys[name]) / "result.json", {"weights": weights})
    settings = {"fit": "sgd", "learning_rate": 1e-4, "init_from": None}
    stages = [
        Stage.model_construct(**settings, name="A-96"),
        Stage.model_construct(**settings | {"init_from": "A-96"} | changes, name="D-96"),
    ]
    return beside_parents(stages, keys, store, classes=2, pictures=400)


def test_a_stage_whose_rate_was_too_large_is_named(tmp_path):
    assert said_of(tmp_path, (0.85, 0.4), (0.24, 12274.0)) == [
        "D-96 ended worse than chance on val: mean loss 1.227e+04, and 0.69 without a look at the pictures; lower its"
        " learning_rate of 0.0001"
    ]
    assert said_of(tmp_path, (0.85, 0.4), (0.80, 0.5)) == [
        "D-96 ended below A-96, which it starts from, on val: top-1 80.0 against 85.0 %; lower its learning_rate of 0.0001"
    ]


@pytest.mark.parametrize(
    ("child", "changes"),
    [
        ((0.84, 0.41), {}),                         # within two standard errors
        ((0.80, 0.39), {}),                         # the loss is lower
        ((0.80, None), {}),                         # of a version that recorded no loss
        ((0.24, 0.69), {"init_from": None}),        # nothing to be beside
        ((0.24, 12.0), {"fit": "logistic"}),        # has no rate
    ],
)
def test_a_stage_that_is_about_as_good_as_its_parent_is_left_alone(tmp_path, child, changes):
    assert said_of(tmp_path, (0.85, 0.4), child, **changes) == []


def test_results_of_a_version_that_recorded_no_losses_are_left_alone(tmp_path):
    store, keys = Store(tmp_path), {"A-96": "a" * 16, "D-96": "d" * 16}
    stages = [
        Stage.model_construct(fit="sgd", learning_rate=1e-4, init_from=None, name="A-96"),
        Stage.model_construct(fit="sgd", learning_rate=1e-4, init_from="A-96", name="D-96"),
    ]
    for key in keys.values():
        write_json(store.stage(key) / "result.json", {"checkpoint": "iteration-4", "val_top1_accuracy": 0.1})

    assert beside_parents(stages, keys, store, classes=2, pictures=400) == []

    entry = {"last": {"file": "w", "digest": "0", "val_top1_accuracy": 0.2, "val_loss": 0.6}}
    write_json(store.stage(keys["D-96"]) / "result.json", {"weights": entry})      # a new stage from an old one
    assert beside_parents(stages, keys, store, classes=2, pictures=400) == []
