"""A challenger's new classes: what the store knows of them on test, and who decides about a model that has some."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from deploy.gate import Check, GateRules
from deploy.gate_classes import NewClass, grown_words, new_class_figures
from deploy.tracking_address import shown
from training.store import Store, read_json
from vggcore.class_order import added_classes


def figures_on_test(store: Store, opened: Any, old: Sequence[str]) -> tuple[NewClass, ...]:
    """How an opened model (deploy.predict.Predictor) does on test with the classes that are not among `old`.

    From the evaluation by its own protocol, as it was registered; () where that is not in the store, or nothing is new.
    """
    added, lineage = added_classes(old, opened.classes), opened.description["lineage"]
    if not added or not lineage.get("stage_key"):
        return ()
    protocol = opened.description["protocol"]
    question = {"protocol": protocol["name"], "scales": list(protocol["scales"]), "split": "test"}
    question |= {"fingerprint": lineage["fingerprint"], "classes": list(opened.classes)}
    besides = (protocol.get("views", "none"), lineage.get("weights_digest"))
    for path in sorted((store.root / "evaluations" / lineage["stage_key"]).glob("*/evaluation.json")):
        facts = read_json(path)
        if facts is None or (facts.get("views", "none"), facts.get("weights")) != besides:
            continue
        if question.items() <= facts.items():
            return new_class_figures(opened.classes, np.array(facts["confusion"], np.int64), added)
    return ()


def person_check(old: Sequence[str], new: Sequence[str], command: str | None) -> Check:
    """Whether the gate may be asked about models of these classes; command: what a person types, None where one is typing."""
    grown = grown_words(old, new)
    if grown is None:
        return Check("new classes", True, "no class is new", "a person's decision")
    if command is None:
        return Check("new classes", True, f"{grown}; a person, or the pipeline, asks the gate", "a person's decision")
    wanted = f'a person\'s decision: run `{command}` to ask the gate, or set [gate] new_classes = "gate" in the pipeline file'
    return Check("new classes", False, grown, wanted)


def promote_command(model: str, version: str, *, store: Path, tracking: str | None, rules: GateRules) -> str:
    """What a person types to have the gate asked about a version, by the same rules; secrets in addresses are left out."""
    words = ["vggrow", "models", "promote", f"models:/{model}/{version}", "--store", str(store)]
    if tracking is not None:
        words += ["--tracking", shown(tracking)]
    default = asdict(GateRules())
    for name, value in asdict(rules).items():
        if value != default[name]:
            words += [f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)
