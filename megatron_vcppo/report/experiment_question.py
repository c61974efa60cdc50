"""What an experiment asks: its arms, the claims that its numbers judge, and the figures to draw."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vcppo.errors import UserError
from megatron_vcppo.report.run_data import LARGEST
from megatron_vcppo.report.run_outcomes import OUTCOMES

DEFAULT_OUTCOMES = (
    "pass@1_sft",
    "pass@1",
    "length_first",
    "length_lowest",
    "length_last",
    "explained_variance_first",
    "explained_variance_last",
)
DEFAULT_FIGURES = (
    {"curve": "rollout/accuracy"},
    {"curve": "rollout/length_mean"},
    {"curve": "critic/explained_variance"},
    {"curve": "actor/give_up_advantage_sigma"},
    {"profile": "advantage_by_decile"},
    {"profile": "value_by_decile"},
)
FIGURE_KEYS = {
    "curve": {"curve", "stage"},
    "profile": {"profile"},
    "scatter": {"scatter"},
    "setting": {"setting", "outcome"},
}
"""Kind of a figure, which is its first key → all its keys."""
PROFILES = ("advantage_by_position", "advantage_by_decile", "value_by_position", "value_by_decile")
COMPARISON, CORRELATION = {"text", "outcome", "higher", "than", "by"}, {"text", "correlation", "sign"}


@dataclass(frozen=True)
class Claim:
    """A sentence that numbers judge: one arm above another, or above a number; or a correlation over all runs.

    Example: ``Claim("VC-PPO beats PPO", outcome="pass@1", higher="VC-PPO", than="PPO")``.
    """

    text: str
    outcome: str = ""
    higher: str = ""
    """The arm whose outcome is claimed to be the higher one; empty for a correlation."""
    than: str | float = 0.0
    """An arm, compared seed by seed, or a number."""
    by: float = 0.0
    """How much higher; below 0: no worse by more than that."""
    correlation: tuple[str, str] | None = None
    """Two outcomes."""
    sign: int = 1
    """Of the claimed correlation."""


@dataclass(frozen=True)
class Question:
    """The part of an experiment file that the report needs."""

    name: str
    title: str
    question: str
    shared: str
    """What the arms have in common, and over which seeds, as text."""
    arms: dict[str, dict[str, Any]]
    """Arm → its overrides by dotted key."""
    against: str
    """The arm from which the others' differences are taken."""
    claims: tuple[Claim, ...]
    figures: tuple[dict[str, Any], ...]
    outcomes: tuple[str, ...]
    """The columns of the table."""

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> "Question":
        """From what ``as_dict`` gives, or an experiment file holds. UserError naming ``where`` for what is wrong."""
        if not values["arms"]:
            raise UserError(f"{where}: arms: there are none")
        arms = _arms(values["arms"], where)
        claims = tuple(_claim(claim, arms, where) for claim in _list(values, "claims", where))
        figures = tuple(_figure(figure, where) for figure in _list(values, "figures", where) or DEFAULT_FIGURES)
        outcomes = tuple(_list(values, "outcomes", where) or DEFAULT_OUTCOMES)
        for name in outcomes:
            _known_outcome(name, where)
        against = next(iter(arms)) if values.get("against") is None else values["against"]
        _known_arm(against, arms, f"{where}: against")
        texts = {key: _text(values, key, where) for key in ("name", "title", "question", "shared")}
        if not texts["title"]:
            raise UserError(f"{where}: title is empty: say in a few words what is compared")
        return cls(**texts, arms=arms, against=against, claims=claims, figures=figures, outcomes=outcomes)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, from which ``of`` makes an equal one."""
        values = dataclasses.asdict(self)
        return values | {"claims": [_plain_claim(claim) for claim in self.claims]}


def one_line(key: Any) -> str:
    """A key or a name of the file in a message."""
    return " ".join(str(key).split())


def _arms(values: Any, where: str) -> dict[str, dict[str, Any]]:
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: arms must hold keys and values, got {values!r}")
    for name, overrides in values.items():
        if not isinstance(overrides, Mapping | None):
            raise UserError(f"{where}: arm {one_line(name)}: expected keys and values, got {overrides!r}")
    return {str(name): dict(overrides or {}) for name, overrides in values.items()}


def _list(values: Mapping[str, Any], key: str, where: str) -> Sequence[Any]:
    found = values.get(key)
    if not isinstance(found, list | tuple | None):
        raise UserError(f"{where}: {key} must be a list, got {found!r}")
    return found or ()


def _text(values: Mapping[str, Any], key: str, where: str) -> str:
    text = values.get(key)
    if not isinstance(text, str | None):
        raise UserError(f"{where}: {key} must be text (in quotes if it is a number), got {text!r}")
    return (text or "").strip()


def _claim(values: Any, arms: Mapping[str, Any], where: str) -> Claim:
    if not isinstance(values, Mapping) or not isinstance(values.get("text"), str) or not values["text"]:
        raise UserError(f"{where}: a claim needs a text, got {values!r}")
    where = f"{where}: claim {values['text']!r}"
    known = CORRELATION if "correlation" in values else COMPARISON
    if unknown := [key for key in values if key not in known]:
        raise UserError(f"{where}: unknown {one_line(unknown[0])}; there are {', '.join(sorted(known))}")
    if "correlation" in values:
        pair = values["correlation"]
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UserError(f"{where}: correlation names two outcomes, got {pair!r}")
        for name in pair:
            _known_outcome(name, where)
        signs = {"positive": 1, "negative": -1}
        sign = values.get("sign", "positive")
        if not isinstance(sign, str) or sign not in signs:
            raise UserError(f"{where}: sign is positive or negative, got {sign!r}")
        return Claim(values["text"], correlation=(pair[0], pair[1]), sign=signs[sign])
    if missing := sorted({"outcome", "higher", "than"} - set(values)):
        raise UserError(f"{where}: {missing[0]} is missing")
    _known_outcome(values["outcome"], where)
    _known_arm(values["higher"], arms, where)
    than = values["than"]
    if isinstance(than, str):
        _known_arm(than, arms, where)
    elif not _is_number(than):
        raise UserError(f"{where}: than is an arm or a number, got {than!r}")
    if not _is_number(values.get("by", 0.0)):
        raise UserError(f"{where}: by is a number, got {values['by']!r}")
    return Claim(values["text"], values["outcome"], values["higher"], than, float(values.get("by", 0.0)))


def _plain_claim(claim: Claim) -> dict[str, Any]:
    if claim.correlation:
        sign = "positive" if claim.sign > 0 else "negative"
        return {"text": claim.text, "correlation": [*claim.correlation], "sign": sign}
    values = dataclasses.asdict(claim)
    return {key: values[key] for key in ("text", "outcome", "higher", "than", "by")}


def _figure(values: Any, where: str) -> dict[str, Any]:
    kind = next((key for key in FIGURE_KEYS if isinstance(values, Mapping) and key in values), None)
    if kind is None or set(values) - FIGURE_KEYS[kind]:
        raise UserError(f"{where}: figure {values!r}: write one of curve, profile, scatter, setting with outcome")
    if kind == "profile" and values[kind] not in PROFILES:
        raise UserError(f"{where}: no profile {values[kind]!r}; there are {', '.join(PROFILES)}")
    names = values["scatter"] if kind == "scatter" else [values.get("outcome")] if kind == "setting" else []
    if kind == "scatter" and (not isinstance(names, list | tuple) or len(names) != 2):
        raise UserError(f"{where}: scatter names two outcomes, got {names!r}")
    for name in names:
        _known_outcome(name, where)
    if not all(isinstance(value, str) for key, value in values.items() if key != "scatter"):
        raise UserError(f"{where}: figure {values!r}: each is a name")
    return dict(values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _known_outcome(name: Any, where: str) -> None:
    if not isinstance(name, str) or name not in OUTCOMES:
        raise UserError(f"{where}: no outcome {name!r}; there are {', '.join(OUTCOMES)}")


def _known_arm(name: Any, arms: Mapping[str, Any], where: str) -> None:
    if not isinstance(name, str):
        raise UserError(f"{where}: the name of an arm must be text (in quotes if it is a number), got {name!r}")
    if name not in arms:
        raise UserError(f"{where}: no arm {name!r}; there are {one_line(', '.join(arms))}")
