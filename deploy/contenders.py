"""The two models of a decision: opened, traced, scored on the gate list; or the refusal that makes scores needless."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from deploy.decision_record import ROLLED_BACK_TAG
from deploy.gate import Check, Decision, GateRules, Score, decide, first_decision, listed, same_classes, verdict
from deploy.gate_classes import NewClass
from deploy.gate_evidence import Lineage, gate_of, gate_pictures, leaks, score, spent_before, stage_of, trace, use_number
from deploy.new_classes import figures_on_test, person_check
from deploy.registry import STAGE_KEY_TAG, TOP1_TAG
from deploy.registry_versions import find_copy, full_name
from pipelines.gate_list import GateList
from training.store import Store
from vggcore.class_order import added_classes
from vggcore.digest import digest
from vggcore.errors import DatasetError, RegistryError


@dataclass(frozen=True)
class Contender:
    """A model that is compared: opened, with its stage and where it comes from."""

    model: str
    stage_key: str | None
    opened: Any                          # deploy.predict.Predictor
    lineage: Lineage


@dataclass(frozen=True)
class Evidence:
    """What the gate is asked with; `refusal` where it need not be asked, and then no score."""

    id: str                              # the same facts and rules have the same id: asked again it is no new use
    gate: GateList | None
    challenger: Score | None
    champion: Score | None
    refusal: Decision | None
    new_classes: tuple[NewClass, ...] = ()


def compare(client: MlflowClient, *, store: Store, a: str, b: str, rules: GateRules | None = None) -> Decision:
    """What the gate would say of A in the place of B; nothing is recorded or counted.

    a, b: any MODEL. A may append classes to those of B. Raises DatasetError for models of other classes or pictures, and
    where there is no gate list.
    """
    from deploy.predict import open_model

    rules = rules or GateRules()
    both = []
    for model in (a, b):
        opened = open_model(model, store=store.root, tracking=str(client.tracking_uri))
        key = opened.description["lineage"].get("stage_key")
        both.append(Contender(model, key, opened, trace(store, key, model=model)))
    new, old = both
    classes = same_classes(nothing(new), nothing(old))
    if not classes.passed:
        raise DatasetError(f"{a} and {b} know other classes ({classes.found}); nothing to compare them on")
    gate, other = gate_of(store, new.lineage), gate_of(store, old.lineage)
    if gate is None:
        raise DatasetError(
            f"{a}: no gate list for the pictures it learnt from; set [data] split.gate and train again, or measure each model"
            " with vggrow evaluate"
        )
    if other is not None and other.home != gate.home:
        raise DatasetError(f"{a} and {b} learnt from other pictures, with another gate list each; nothing to compare them on")
    scores = score_both(store, gate, new, old, keep=True)
    asked = decision_id(gate, new.model, old.model, scores[0], rules)
    return decide(
        *scores,
        rules,
        use=use_number(gate, asked),
        spent=spent_before(gate, asked),
        leaks=leaks(gate, [new.lineage, old.lineage]),
        lineage_problems=[*new.lineage.problems, *old.lineage.problems],
        new_classes=figures_on_test(store, new.opened, old.opened.classes),
    )


def gather(
    client: MlflowClient,
    store: Store,
    wanted: ModelVersion,
    champion: ModelVersion | None,
    rules: GateRules,
    *,
    rolled: Check,
    floor: float,
    keep: bool,
    person: str | None = None,
) -> Evidence:
    """Lineage, leaks and scores, or the refusal that makes scores needless: the gate list is then not looked at.

    person: the command by which a person decides about new classes; None: the gate is asked about them too.
    """
    new = contender(client, store, wanted)
    if champion is None:
        return first_version(wanted, new, floor, rolled)
    old = contender(client, store, champion)
    gate = gate_of(store, new.lineage)
    problems = [*new.lineage.problems, *old.lineage.problems]
    seen = leaks(gate, [new.lineage, old.lineage]) if gate else []
    grown = figures_on_test(store, new.opened, old.opened.classes)
    unknown = sorted(set(gate.classes) - set(new.opened.classes)) if gate else []
    listed_for = "no gate list for its pictures" if gate is None else f"gate list of {len(gate.contents):,} pictures"
    checks = [
        same_classes(nothing(new), nothing(old)),
        person_check(old.opened.classes, new.opened.classes, person),
        rolled,
        Check("lineage", not problems, listed("lineage problems", problems), "stage, pictures and code on record"),
        Check("gate", gate is not None, listed_for, "[data] split.gate in the recipe it is trained by"),
        Check("gate classes", not unknown, listed("gate classes unknown to it", unknown), "none; renew the gate list"),
        Check("leaks", not seen, listed("gate pictures seen in training", seen), "none; renew the list or train without"),
    ]
    if gate is None or not all(check.passed for check in checks):
        refusal = Decision(
            False, verdict(checks, ""), tuple(checks), rules.metric, challenger=new.model, champion=old.model, new_classes=grown
        )
        facts = [new.model, old.model, refusal.reason, gate.digest if gate else None]
        return Evidence(digest(["refused", *facts], hex_characters=32), gate, None, None, refusal)
    scores = score_both(store, gate, new, old, keep=keep)
    return Evidence(decision_id(gate, new.model, old.model, scores[0], rules), gate, *scores, None, grown)


def rollback_check(client: MlflowClient, wanted: ModelVersion, target: str) -> Check:
    """Whether the version, or its copy in the model `target`, was rolled back and not promoted by hand since."""
    copy = find_copy(client, wanted, target)
    tags = {**wanted.tags, **(copy.tags if copy is not None else {})}
    rolled = tags.get(ROLLED_BACK_TAG)
    was = f"this version was rolled back on {rolled}" if rolled else "this version was never rolled back"
    return Check("rollback", rolled is None, was, "a person's word (--force --reason)")


def first_version(wanted: ModelVersion, new: Contender, floor: float, rolled: Check) -> Evidence:
    """The evidence where there is no champion: test top-1 against the floor, and a lineage on record."""
    try:
        test_top1 = float(wanted.tags[TOP1_TAG])
    except (KeyError, ValueError) as error:
        raise RegistryError(
            f"{new.model}: no tag {TOP1_TAG}, and no champion to compare it with; vggrow did not register it: promote it by"
            " --force --reason"
        ) from error
    decision = first_decision(test_top1, floor)
    found = listed("lineage problems", new.lineage.problems)
    checks = (rolled, Check("lineage", not new.lineage.problems, found, "stage, pictures and code on record"))
    if not all(check.passed for check in checks):
        decision = Decision(False, verdict(checks, ""), (*checks, *decision.checks), decision.metric)
    named = Decision(**{**vars(decision), "challenger": new.model})
    return Evidence(digest(["first", new.model, named.reason], hex_characters=32), None, None, None, named)


def contender(client: MlflowClient, store: Store, version: ModelVersion) -> Contender:
    """A version opened, with its lineage; what its package says of its stage must be what its tag says."""
    from deploy.predict import open_model

    model = f"models:/{full_name(version)}"
    key = version.tags.get(STAGE_KEY_TAG)
    opened = open_model(model, store=store.root, tracking=str(client.tracking_uri))
    packaged = opened.description["lineage"].get("stage_key")
    lineage = trace(store, key, model=model)
    if packaged != key:
        words = f"{model}: its tag names stage {key}, its package {packaged}"
        lineage = Lineage(lineage.stages, (*lineage.problems, words))
    return Contender(model, key, opened, lineage)


def score_both(
    store: Store, gate: GateList, new: Contender, old: Contender, *, keep: bool
) -> tuple[Score, Score]:
    """Both models' scores by the challenger's protocol and test scales, or the champion's own where its crop forbids them.

    A linear head has one protocol, its own: where one of them has such a head, each is scored as it is served. On the
    pictures of the champion's classes, which are the challenger's first, where that has more.
    """
    pictures = gate_pictures(store, gate, new.lineage, new.opened.classes)
    if added_classes(old.opened.classes, new.opened.classes):
        pictures = pictures.some(pictures.labels < len(old.opened.classes))
    linear = any(stage_of(each.opened).head == "linear" for each in (new, old))
    found = []
    for each in (new, old):
        served = (each if linear else new).opened.description["protocol"]
        protocol, own = served["name"], served["scales"]
        if not linear and min(own) < stage_of(each.opened).crop:
            own = each.opened.description["protocol"]["scales"]
        found.append(
            score(
                gate,
                pictures,
                model=each.model,
                identity=identity_of(each.opened),
                opened=each.opened,
                protocol=protocol,
                scales=own,
                keep=keep,
            )
        )
    return found[0], found[1]


def identity_of(opened: Any) -> str:
    """32 hex characters for all of an opened model (deploy.predict.Predictor) that its scores come from.

    Not its stage's key: that is what a package says of itself, and scores are kept.
    """
    weights = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(opened.weights.items()):
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        weights.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    told = {name: value for name, value in opened.description.items() if name not in ("protocol", "lineage")}
    return digest([told, weights.hexdigest()], hex_characters=32)


def decision_id(gate: GateList, new: str, old: str, challenger: Score, rules: GateRules) -> str:
    """32 hex characters for a question to the gate: asked again it is the same question, and no other use of the list."""
    protocol = [challenger.protocol, list(challenger.scales), *([challenger.views] if challenger.views != "none" else [])]
    return digest([gate.digest, new, old, protocol, asdict(rules)], hex_characters=32)


def nothing(contender: Contender) -> Score:
    """A Score without pictures: for the question of classes alone."""
    classes = contender.opened.classes
    empty = np.zeros((0, len(classes)), np.float32)
    return Score(contender.model, classes, (), np.zeros(0, np.int64), empty, "", (), 0.0, None)
