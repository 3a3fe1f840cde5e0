"""A decision for people: the evidence as a table for the terminal; and a decision read back from its JSON."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from deploy.gate import Check, ClassChange, Decision
from deploy.gate_classes import new_class_of_json, new_class_text


def needed_text(found: Mapping[str, Any]) -> str:
    """What gain would have been enough, and how often a model truly that much better would pass."""
    if found["needed_gain"] is None:
        return "needed gain    none would be enough with so few pictures"
    return f"needed gain    {points(found['needed_gain'])} points, power there {100 * found['power']:.0f} %"


def decision_text(found: Mapping[str, Any]) -> str:
    """A decision's JSON (Decision.to_json) as lines: verdict, counts, classes, conditions."""
    lines = [
        f"challenger     {found.get('challenger') or 'none'}",
        f"champion       {found.get('champion') or 'none'}",
        f"verdict        {found['reason']}",
    ]
    if found.get("counts"):
        counts = found["counts"]
        lines += [
            f"gain           {points(found['gain'])} points ({found['metric']}), at least {points(found['gain_low'])}",
            f"p              {found['p_value']:.4g}, limit {found['alpha_k']:.4g} (use {found['use']} of the list)",
            needed_text(found),
            "",
            f"{'gate pictures':<24}{'champion right':>16}{'champion wrong':>16}",
            f"{'challenger right':<24}{counts['both_right']:>16,}{counts['only_challenger']:>16,}",
            f"{'challenger wrong':<24}{counts['only_champion']:>16,}{counts['both_wrong']:>16,}",
        ]
    if found.get("classes"):
        width = max(len("class"), *(len(one["name"]) for one in found["classes"]))
        lines += ["", f"{'class':<{width}}{'pictures':>10}{'champion':>11}{'challenger':>12}{'change':>9}{'lowest':>9}"]
        for one in found["classes"]:
            recalls = f"{100 * one['champion_recall']:>9.1f} %{100 * one['challenger_recall']:>10.1f} %"
            changes = f"{points(one['change']):>9}{points(one['low']):>9}"
            lines.append(f"{one['name']:<{width}}{one['pictures']:>10,}{recalls}{changes}")
    if found.get("new_classes"):
        lines += ["", *map(new_class_text, found["new_classes"])]
    lines += ["", *(condition(check) for check in found["checks"])]
    return "\n".join(lines).rstrip()


def condition(check: Mapping[str, Any]) -> str:
    """One condition: whether it holds, what was found, what was wanted."""
    wanted = "" if check["passed"] else f"; expected {check['wanted']}"
    return f"{'holds' if check['passed'] else 'FAILS'}  {check['name']}: {check['found']}{wanted}"


def points(share: float | None) -> str:
    """A share as signed percentage points, None (beyond any) as a word."""
    return "no" if share is None else f"{100 * share:+.1f}"


def decision_of_json(found: Mapping[str, Any]) -> Decision:
    """The Decision that to_json wrote; a needed gain of null beside counts was beyond any."""
    values = {field.name: found[field.name] for field in fields(Decision) if field.name in found}
    values["checks"] = tuple(Check(**check) for check in found["checks"])
    values["classes"] = tuple(ClassChange(**one) for one in found.get("classes", ()))
    values["new_classes"] = tuple(map(new_class_of_json, found.get("new_classes", ())))
    if found.get("counts") and found.get("needed_gain") is None:
        values["needed_gain"] = math.inf
    return Decision(**values)
