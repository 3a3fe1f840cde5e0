"""The report page: parsed as a browser would, its numbers held against the store they came from."""

import base64
import hashlib
import io
import itertools
import json
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deploy import charts
from deploy.report import write_report
from deploy.yardsticks import Yardstick, Yardsticks, gain_over, gain_text, read_measured, write_yardsticks
from pipelines.colour import SUMS, Colour
from pipelines.manifest import SCHEMA, GateName, Manifest, fingerprint_of, write_manifest
from vggcore.errors import StoreError
from vggcore.metrics import balanced_accuracy, confusion_matrix, macro_auc, top_k_accuracy

VOID = {"meta", "link", "br", "img", "path", "input", "hr", "use", "rect", "image"}
COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200))
KEY = "00aa11bb22cc33dd"


class Page(HTMLParser):
    """What a test asks of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.headings: list[tuple[int, str]] = []
        self.feed(self.source)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.open or "svg" in self.open:
            return
        self.text += data + " "
        if self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            level, words = self.headings[-1]
            self.headings[-1] = (level, words + data)

    def row(self, *start: str) -> list[str]:
        """The first table row that begins with these cells."""
        return next(row for row in self.rows if row[: len(start)] == list(start))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every such tag."""
        return [attributes for name, attributes in self.tags if name == tag]


@dataclass
class Made:
    """A store made for a test, and the places in it that tests break."""

    store: Path
    root: Path
    classes: tuple[str, ...]
    manifest: Manifest
    posteriors: np.ndarray
    evaluation: Path
    schedule: Path
    stages: dict = field(default_factory=dict)


def make_store(folder: Path, classes: tuple[str, ...], *, each: int = 4, key: str = KEY, name: str = "pets") -> Made:
    """A store of three stages, A and D finished, the last one begun; pictures are solid colours by class."""
    store, root = folder / "store", folder / "pictures"
    columns: dict[str, list] = {field.name: [] for field in SCHEMA}
    for number, label in enumerate(classes):
        for place in range(3 * each):
            split = ("train", "val", "test")[place % 3]
            path = f"{split}/{number}/{place:02}.png"
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), COLOURS[number % 3]).save(root / path)
            content = hashlib.blake2b((root / path).read_bytes(), digest_size=16).hexdigest()
            row = {"path": path, "class": label, "split": split, "height": 30, "width": 40, "content": content}
            for column, value in {**row, "bytes": 100, "group": None, **dict.fromkeys(SUMS, 1)}.items():
                columns[column].append(value)
    table = pa.table(columns, schema=SCHEMA).sort_by("path")
    colour = Colour(mean=np.ones(3), deviation=np.ones(3), axes=np.eye(3), eigenvalues=np.ones(3))
    manifest = Manifest(root, classes, table, fingerprint_of(table), colour, (), ("a note of the scan",))
    write_manifest(manifest, store / "data" / manifest.fingerprint)

    test = manifest.split("test")
    draws = np.random.default_rng(3).random((len(test), len(classes))) + 2.0 * np.eye(len(classes))[test.labels]
    everyone = np.eye(len(classes))
    draws[0] = 2.0 * everyone[1] + 1       # the first test picture, of class 0, is taken for class 1
    draws[-1] = 97 * everyone[-2] + 1      # the last one, of the last class, for the class before it, and surely
    posteriors = (draws / draws.sum(axis=1, keepdims=True)).astype(np.float32)
    stages, evaluations = [], {}
    plan = (("A-64", "A", [64, 64], None), ("D-64", "D", [64, 64], "A-64"), ("D-64-80", "D", [64, 80], "D-64"))
    for stage, net, scale, parent in plan:
        stage_key = hashlib.blake2b(stage.encode(), digest_size=8).hexdigest()
        stages.append({"name": stage, "key": stage_key, "net": net, "scale": scale, "init_from": parent})
        place = store / "stages" / stage_key
        place.mkdir(parents=True)
        (place / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history(epochs=3)) + '{"torn')
        if stage == "D-64-80":
            continue
        result = {"checkpoint": "iteration-30", "epochs": 3, "iterations": 30, "val_top1_accuracy": 0.8125, "seconds": 75.0}
        (place / "result.json").write_text(json.dumps(result | {"ended_by": "plateau", "world_size": 2, "device": "cpu"}))
        evaluation = store / "evaluations" / stage_key / "dense"
        evaluation.mkdir(parents=True)
        predictions = posteriors.argmax(axis=1)
        facts = {
            "stage": stage, "stage_key": stage_key, "protocol": "dense", "scales": [64, 73], "split": "test",
            "pictures": len(test), "top1_accuracy": top_k_accuracy(posteriors, test.labels),
            "balanced_accuracy": balanced_accuracy(predictions, test.labels, len(classes)),
            "auc": macro_auc(posteriors, test.labels), "loss": 0.5, "classes": list(classes),
            "confusion": confusion_matrix(predictions, test.labels, len(classes)).tolist(), "seconds": 1.0,
        }   # fmt: skip
        (evaluation / "evaluation.json").write_text(json.dumps(facts))
        shown = {"path": list(test.paths), "content": list(test.contents), "label": test.labels, "posteriors": list(posteriors)}
        pq.write_table(pa.table(shown), evaluation / "posteriors.parquet")
        evaluations[stage] = str(evaluation.relative_to(store))
    schedule = store / "schedules" / key
    schedule.mkdir(parents=True)
    (schedule / "recipe.toml").write_text(f'name = "{name}"   # <as written> & kept\n')
    record = {
        "name": name, "key": key, "fingerprint": manifest.fingerprint, "classes": list(classes), "stages": stages,
        "evaluations": evaluations, "tracking": "https://me:hunter2@mlflow.example:5000", "experiment_id": "7",
        "parent_run_id": "f" * 32, "runs": {"A-64": "a" * 32},
        "registered": {"stage": "D-64", "name": name, "version": "3", "alias": "champion", "uri": f"models:/{name}/3"},
    }   # fmt: skip
    (schedule / "stages.json").write_text(json.dumps(record))
    return Made(store, root, classes, manifest, posteriors, evaluation, schedule, record)


@pytest.mark.parametrize("place", ["stage", "schedule"])
def test_suspected_labels_are_shown_with_what_their_neighbours_have(tmp_path, place):
    made = make_store(tmp_path, ("cat", "<i>dog"))
    path = made.manifest.split("train").paths[0]
    row = {"path": path, "content": "0" * 32, "class": "cat", "neighbours_class": "<i>dog", "neighbours": 9}
    gone = {**row, "path": "train/<script>gone.png", "nearest": path}
    second = json.loads((made.schedule / "stages.json").read_text())["stages"][1]
    folder = made.schedule if place == "schedule" else made.store / "stages" / second["key"]
    (folder / "suspects.json").write_text(
        json.dumps({"pictures": 16, "neighbours": 10, "suspects": [{**row, "nearest": "val/near.png"}, gone]})
    )

    page = Page(write_report(made.store, None))

    assert (2, "Suspected labels") in page.headings
    source = "D-64" if place == "stage" else "the yardstick on features"
    assert f"2 of 16, most of whose 10 nearest pictures by the features of {source} have one other label" in page.text
    assert "but 9 of 10 neighbours: <i>dog" in page.text and "train/<script>gone.png" in page.text
    assert not [attributes for tag, attributes in page.tags if tag in ("i", "script")]
    assert "the file has changed since it was scanned" in page.text and "cannot be shown: No such file" in page.text


@pytest.mark.parametrize(("found", "words"), [([], "None: of 16 pictures"), (None, "16 pictures are too many")])
def test_no_suspected_label_is_said(tmp_path, found, words):
    made = make_store(tmp_path, ("cat", "dog"))
    (made.schedule / "suspects.json").write_text(json.dumps({"pictures": 16, "neighbours": 10, "suspects": found}))

    assert words in Page(write_report(made.store, None)).text


def history(*, epochs: int) -> list[dict]:
    """Ten iterations an epoch; the learning rate falls after the second epoch."""
    rows: list[dict] = []
    for epoch in range(1, epochs + 1):
        rows += [{"iteration": 10 * (epoch - 1) + step, "train_loss": 0.7 / (epoch + step)} for step in range(1, 11)]
        rate = 0.01 if epoch <= 2 else 0.001
        row = {"epoch": epoch, "iteration": 10 * epoch, "train_loss": 0.6 / epoch, "val_loss": 0.7 / epoch}
        rows.append(row | {"val_top1_accuracy": 0.5 + epoch / 10, "learning_rate": rate, "seconds": 9.5})
    return rows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One store for the tests that only read it; class names are as hostile as folder names may be."""
    made = make_store(tmp_path_factory.mktemp("report"), ('<b>bold</b> & "co"', "cat's"))
    labels = tuple(made.manifest.split("test").labels.tolist())
    row = Yardstick("majority class", "the most frequent", 0.5, 0.5, 0.5, (0,) * len(labels), 0.01)
    paths = tuple(made.manifest.split("test").paths)
    write_yardsticks(made.schedule / "yardsticks.json", Yardsticks(8, 8, 8, paths, labels, (row,)))
    return made


@pytest.fixture(scope="module")
def page(made: Made) -> Page:
    """Its page."""
    return Page(write_report(made.store, None))


def test_the_stages_table_says_what_the_store_says(made: Made, page: Page) -> None:
    facts = json.loads((made.evaluation / "evaluation.json").read_text())
    right = int((made.posteriors.argmax(axis=1) == made.manifest.split("test").labels).sum())

    row = page.row("D-64", "D")

    assert row[2:7] == ["64", "A-64", "3 30 iterations", "1 min 15 s", f"{81.25:.1f} %"]
    assert row[7] == f"{100 * facts['top1_accuracy']:.1f} % {right} of 8"
    assert row[8:] == [f"{100 * facts['balanced_accuracy']:.1f} %", f"{facts['auc']:.3f}"]
    assert page.row("D-64-80 not finished: 3 epochs so far", "D")[2:] == ["64 to 80", "D-64", *"––––––"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([{}, {"rule": "plateau"}, {"fit": "sgd"}], "Val steered the learning rate, test had no part in training."),
        ([{"rule": "cosine"}, {}, {"fit": "logistic"}], "Val steered the learning rate of D-64, test had no part in training."),
        ([{"rule": "cosine"}, {"rule": "cosine"}, {"fit": "logistic"}], "trained. Test had no part in training."),
    ],
)
def test_val_steered_the_learning_rate_where_the_plateau_rule_did(settings, words: str, tmp_path: Path) -> None:
    made = make_store(tmp_path, ("cat", "dog"), each=1)
    for name, its in zip(("A-64", "D-64", "D-64-80"), settings, strict=True):
        folder = made.store / "stages" / hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        (folder / "stage.json").write_text(json.dumps({"stage": {"seed": 1, **its}}))

    assert words in Page(write_report(made.store, None)).text


def test_a_page_replaces_a_page_of_ours_and_nothing_else(tmp_path: Path) -> None:
    made = make_store(tmp_path, ("cat", "dog"), each=1)
    page, letter = tmp_path / "page.html", tmp_path / "letter.html"
    letter.write_text("<!doctype html><title>Dear vggrow</title>")

    write_report(made.store, None, page)
    write_report(made.store, None, page)
    with pytest.raises(StoreError, match=r"letter.html: exists already and is not a page of vggrow's; name another file"):
        write_report(made.store, None, letter)

    assert letter.read_text() == "<!doctype html><title>Dear vggrow</title>"


def test_the_data_the_lineage_and_the_commands_are_on_the_page(made: Made, page: Page) -> None:
    assert page.row("cat's")[1:] == ["4", "4", "4", "12"]
    assert page.row("all")[1:] == ["8", "8", "8", "24"]
    assert made.manifest.fingerprint in page.text
    assert "a note of the scan" in page.text
    assert 'name = "pets" # <as written> & kept' in page.text
    lineage = page.row("D-64", made.stages["stages"][1]["key"])
    assert lineage[2] == made.stages["stages"][0]["key"]
    assert lineage[3].endswith("/checkpoints/iteration-30/model.safetensors")
    assert page.row("A-64", made.stages["stages"][0]["key"])[5] == "a" * 32
    assert "vggrow predict models:/pets@champion PICTURE..." in page.text
    assert page.row("Model version")[1] == "pets, version 3, champion models:/pets/3"


def test_the_decision_about_the_registered_version_and_the_gate_split_are_on_the_page(tmp_path: Path) -> None:
    made = make_store(tmp_path, ("cat", "dog.v2"))
    splits = ["gate" if place % 4 == 0 else split for place, split in enumerate(made.manifest.table["split"].to_pylist())]
    column = made.manifest.table.column_names.index("split")
    table = made.manifest.table.set_column(column, SCHEMA.field("split"), pa.array(splits, SCHEMA.field("split").type))
    gate = GateName(key="0" * 16, digest="1" * 32)
    write_manifest(replace(made.manifest, table=table, gate=gate), made.store / "data" / made.manifest.fingerprint)
    decision = {
        "p_value": 0.0001234, "alpha_k": 0.00096, "use": 2, "gain": 0.09, "gain_low": 0.05, "needed_gain": None,
        "counts": {"both_right": 283, "only_challenger": 40, "only_champion": 10, "both_wrong": 0},
    }   # fmt: skip
    line = {"sequence": 1, "action": "promoted", "at": "2026-11-24T10:00:00Z", "by": "ann", "reason": "promoted: <better>"}
    line |= {"version": "3", "candidate": "pets/3", "champion_before": "2", "model": "pets", "decision": decision}
    about_others = line | {"sequence": 2, "version": "4", "candidate": "pets/4", "reason": "of another version"}
    (made.store / "registry" / "pets").mkdir(parents=True)
    (made.store / "registry" / "pets" / "history.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(about_others) + "\n")

    page = Page(write_report(made.store, None))

    assert "promoted: <better>" in page.text and "of another version" not in page.text
    assert page.row("p-value")[1] == "0.000123 limit 0.00096, use 2 of the gate list"
    assert page.row("Gain, points")[1] == "+9.0 at least +5.0"
    assert page.row("Right where the other was not")[1] == "40 the champion 10, of 333 gate pictures"
    cats = [split for split, label in zip(splits, table["class"].to_pylist(), strict=True) if label == "cat"]
    counts = [cats.count(split) for split in ("train", "val", "test", "gate")]
    assert page.row("Class")[1:] == ["train", "val", "test", "gate", "all"]
    assert page.row("cat")[1:] == [*map(str, counts), "12"]


def test_a_version_that_was_gone_back_to_has_no_figures_of_a_gate_and_a_page_all_the_same(tmp_path: Path) -> None:
    made = make_store(tmp_path, ("cat", "dog"), each=1)
    line = {"sequence": 1, "action": "rolled back", "at": "2026-11-24T10:00:00Z", "by": "ann", "reason": "complaints"}
    line |= {"version": "3", "champion_before": "4", "model": "pets", "decision": None}
    (made.store / "registry" / "pets").mkdir(parents=True)
    (made.store / "registry" / "pets" / "history.jsonl").write_text(json.dumps(line) + "\n")

    page = Page(write_report(made.store, None))

    assert "rolled back" in page.text and "complaints" in page.text


@pytest.mark.parametrize(
    ("root", "command"),
    [("pictures", "vggrow train recipe.toml --store"), ("/data/pictures", f"schedules/{KEY}/recipe.toml --store")],
)
def test_the_command_to_train_again_finds_the_pictures(tmp_path: Path, root: str, command: str) -> None:
    made = make_store(tmp_path, ("cat", "dog"), each=1)
    (made.schedule / "recipe.toml").write_text(f'name = "pets"\n[data]\nroot = "{root}"\n')

    page = Page(write_report(made.store, None))

    assert f"{command} {made.store} --tracking" in page.text


def test_the_page_asks_nothing_of_any_server_and_all_its_links_lead_somewhere(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("href", "src", "data")]

    assert not page.all("script") and not page.all("iframe")
    assert all(link and (link.startswith(("#", "data:"))) for link in links)
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import", page.source)
    assert "http://" not in page.source and "https://" not in page.source.replace("https://***@mlflow.example:5000", "")
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    targets = {link[1:] for link in links if link and link.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", page.source))
    assert targets and targets <= set(ids)


def test_the_page_can_be_read_without_eyes_and_without_colour(page: Page) -> None:
    levels = [level for level, _ in page.headings]

    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert page.all("html")[0]["lang"] == "en"
    assert all(image.get("alt") for image in page.all("img"))
    pictures = [svg for svg in page.all("svg") if svg.get("aria-hidden") != "true"]
    assert len(pictures) == 3 and all(svg["role"] == "img" and svg["aria-label"] for svg in pictures)
    assert "loss on train from 0.600 to 0.200" in pictures[0]["aria-label"]
    assert "the learning rate fell to 0.001 after epoch 2" in pictures[0]["aria-label"]
    assert all(cell.get("scope") for cell in page.all("th"))
    assert "prefers-color-scheme: dark" in page.source


def test_names_are_shown_as_they_are_and_never_as_markup(made: Made, page: Page) -> None:
    assert not page.all("b")
    assert '<b>bold</b> & "co"' in page.text
    assert page.row('<b>bold</b> & "co"')[1:] == ["4", "4", "4", "12"]


def test_a_password_in_the_tracking_address_stays_off_the_page(page: Page) -> None:
    assert "hunter2" not in page.source
    assert "***@mlflow.example:5000" in page.text


def test_the_worst_picture_comes_first_with_its_thumbnail(made: Made, page: Page) -> None:
    test = made.manifest.split("test")
    wrong = np.flatnonzero(made.posteriors.argmax(axis=1) != test.labels)

    images = page.all("img")

    assert len(wrong) >= 2 and len(images) == 2 * len(wrong)     # both finished stages have the same posteriors here
    assert images[0]["alt"] == f"{test.paths[-1]}: cat's, taken for <b>bold</b> & \"co\""
    assert [image["alt"] for image in images if str(image["alt"]).startswith(str(test.paths[0]))] != []
    encoded = str(images[0]["src"]).removeprefix("data:image/jpeg;base64,")
    mean = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))).mean(axis=(0, 1))
    assert np.abs(mean - COLOURS[1]).max() < 6
    assert f'<b>bold</b> & "co" {100 * made.posteriors[-1, 0]:.1f} % true: cat\'s' in page.text


def test_the_yardsticks_stand_beside_the_nets_with_the_paired_interval(made: Made, page: Page) -> None:
    measured = read_measured(made.evaluation)
    labels = made.manifest.split("test").labels
    found = Yardsticks(8, 8, 8, tuple(made.manifest.split("test").paths), tuple(labels), ())
    gain = gain_over(measured, found, Yardstick("", "", 0.5, 0.5, 0.5, (0,) * 8, 0.0))

    row = page.row("majority class the most frequent")

    assert gain is not None and gain[0] == pytest.approx(measured_top1(measured) - 0.5)
    assert row[1:5] == ["50.0 %", "50.0 %", "0.500", gain_text(gain)]


def measured_top1(measured) -> float:
    """Top-1 accuracy of stored posteriors."""
    return float((measured.posteriors.argmax(axis=1) == measured.labels).mean())


def test_many_classes_are_a_picture_with_the_most_confused_pairs_beside_it(tmp_path: Path) -> None:
    made = make_store(tmp_path, tuple(f"class {number:02}" for number in range(14)), each=1)

    page = Page(write_report(made.store, None))

    labels = [str(svg.get("aria-label")) for svg in page.all("svg")]
    assert sum("Confusion matrix" in label for label in labels) == 2
    assert page.row("class 00", "class 01")[2] == "1"


def damage_nothing_trained(made: Made) -> None:
    for folder in (made.store / "stages").iterdir():
        for file in folder.iterdir():
            file.unlink()
    record = made.stages | {"evaluations": {}, "runs": {}, "registered": None}
    (made.schedule / "stages.json").write_text(json.dumps(record))


def damage_manifest(made: Made) -> None:
    (made.store / "data" / made.manifest.fingerprint / "manifest.parquet").unlink()


def damage_evaluation(made: Made) -> None:
    (made.evaluation / "posteriors.parquet").write_bytes(b"PAR1 no")


def damage_picture(made: Made) -> None:
    (made.root / str(made.manifest.split("test").paths[0])).unlink()


def damage_picture_by_change(made: Made) -> None:
    Image.new("RGB", (10, 10), (1, 2, 3)).save(made.root / str(made.manifest.split("test").paths[0]))


def damage_yardsticks(made: Made) -> None:
    (made.schedule / "yardsticks.json").write_text("{}")


def damage_recipe_and_history(made: Made) -> None:
    (made.schedule / "recipe.toml").unlink()
    (made.store / "stages" / made.stages["stages"][0]["key"] / "history.jsonl").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_nothing_trained, ["0 of 3 stages finished", "not begun", "nothing was registered"]),
        (damage_manifest, ["The manifest of this data", "the data's manifest is not in the store"]),
        (damage_evaluation, ["cannot be read as an evaluation"]),
        (damage_picture, ["cannot be shown: No such file or directory"]),
        (damage_picture_by_change, ["the file has changed since it was scanned"]),
        (damage_yardsticks, ["cannot be read as yardsticks"]),
        (damage_recipe_and_history, ["The recipe's text is not in the store", "so there are no learning curves"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_what_is_missing_is_said_on_the_page(tmp_path: Path, damage, words: list[str]) -> None:
    made = make_store(tmp_path, ("cat", "dog"), each=1)
    damage(made)

    page = Page(write_report(made.store, None, tmp_path / "page.html"))

    for expected in words:
        assert expected in page.text


def test_the_report_is_of_the_schedule_asked_for_by_key_beginning_or_name(tmp_path: Path) -> None:
    make_store(tmp_path / "one", ("cat", "dog"), each=1)
    other = make_store(tmp_path / "two", ("cat", "dog"), each=1, key="ffee0000ffee0000", name="birds")
    store = tmp_path / "one" / "store"
    (other.schedule).rename(store / "schedules" / "ffee0000ffee0000")

    pages = [Page(write_report(store, wanted)) for wanted in (KEY, "ffee", "birds")]

    assert [page.headings[0][1] for page in pages] == ["pets", "birds", "birds"]
    assert f"{KEY} (pets)" in pages[1].row("Other schedules of this store")[1].replace("  ", " ")
    assert (store / "schedules" / KEY / "report.html").exists()


@pytest.mark.parametrize(
    ("arrange", "key", "words"),
    [
        (lambda made: made.store / "absent", None, ["no store here", "vggrow train RECIPE"]),
        (lambda made: made.root, None, ["no schedule here yet", "makes one"]),
        (lambda made: made.store, "00aa11bb22cc33de", [f"no schedule '00aa11bb22cc33de'; did you mean '{KEY}'?"]),
        (lambda made: made.store, "zzz", [f"there are {KEY} (pets)"]),
    ],
)
def test_an_absent_store_or_schedule_is_one_clear_line(made: Made, arrange, key: str | None, words: list[str]) -> None:
    with pytest.raises(StoreError) as caught:
        write_report(arrange(made), key)

    assert "\n" not in str(caught.value)
    for expected in words:
        assert expected in str(caught.value)


def test_a_folder_or_a_broken_record_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    made = make_store(tmp_path, ("cat", "dog"), each=1)

    with pytest.raises(StoreError, match=r"a folder, wanted the name of the page"):
        write_report(made.store, None, tmp_path)
    (made.schedule / "stages.json").write_text("[]")
    with pytest.raises(StoreError, match=r"stages.json: not a schedule's record"):
        write_report(made.store, None, tmp_path / "page.html")

    assert not (tmp_path / "page.html").exists()


def test_the_curves_of_a_long_run_stay_a_small_picture_with_every_drop_marked() -> None:
    steps = [{"iteration": place, "train_loss": 1000 / place} for place in range(1, 20_001)]
    rates = [0.01] * 8 + [0.001] * 8 + [0.0001] * 4
    epochs = [{"epoch": at + 1, "iteration": 1000 * (at + 1), "learning_rate": rate} for at, rate in enumerate(rates)]

    thin = charts.thinned(steps)
    drawing = charts.svg(charts.draw_learning_curves(steps + epochs), name="c", label="curves")

    assert len(thin) == 400 and thin[-1]["iteration"] == 20_000
    assert thin[1]["train_loss"] == pytest.approx(np.mean([row["train_loss"] for row in steps[50:100]]))
    assert charts.rate_drops(epochs) == [(8000, 0.001), (16000, 0.0001)]
    assert ">rate 0.001<" in drawing and ">rate 0.0001<" in drawing and len(drawing) < 60_000


def test_penalties_of_a_fit_that_has_not_finished_are_called_so_for_the_eye_and_the_ear(tmp_path: Path) -> None:
    made = make_store(tmp_path, ("cat", "dog"))
    name, key = made.stages["stages"][2]["name"], made.stages["stages"][2]["key"]
    figures = {"train_loss": 0.4, "val_loss": 0.5, "val_top1_accuracy": 0.8}
    rows = [{"iteration": place, "C": c, **figures} for place, c in ((1, 1e-4), (2, 3e-4))]
    (made.store / "stages" / key / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    page = Page(write_report(made.store, None))

    assert [heading for level, heading in page.headings if level == 3].count("Penalties") == 1
    assert f"Penalties of {name}" in page.source and f"Learning curves of {name}" not in page.source


@pytest.mark.parametrize("history", [[], [{"iteration": 1, "train_loss": 0.5}], [{"epoch": 1, "iteration": 9}]])
def test_curves_of_a_run_that_has_hardly_begun_are_drawn(history: list[dict]) -> None:
    assert Image.open(io.BytesIO(charts.learning_curves(history))).format == "PNG"


def test_a_confusion_matrix_takes_any_class_name_and_a_class_without_pictures() -> None:
    matrix = np.array([[5, 1, 0], [0, 0, 0], [2, 0, 7]])

    picture = Image.open(io.BytesIO(charts.confusion_figure(matrix, ["$x_1", "a\\b", "n" * 90])))

    assert picture.format == "PNG" and min(picture.size) > 300


def test_a_sheet_shows_each_view_in_its_own_colours_clipped_to_what_a_screen_has() -> None:
    views = np.stack([np.full((3, 16, 16), level, np.float32) for level in (-40.0, 128.0, 300.0)])
    views[1, 1:] = 0      # a dark red

    sheet = np.asarray(Image.open(io.BytesIO(charts.view_sheet(views, ["one", "two", "three"]))).convert("RGB"))

    middle = sheet[int(sheet.shape[0] * 0.6)]
    places = [int(sheet.shape[1] * share) for share in (1 / 6, 1 / 2, 5 / 6)]
    assert [tuple(int(level) for level in middle[place]) for place in places] == [(0, 0, 0), (128, 0, 0), (255, 255, 255)]
