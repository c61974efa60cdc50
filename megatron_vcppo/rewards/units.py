r"""The unit of an answer: "12 cm", ``\$5``, ``90 \text{ square units}``.

An answer with its unit equals the bare number; two units must agree; nothing is converted. math-verify's own list
also drops letters (it takes 5t for 5 and 2x+5d for 2x+5), so it is off.
"""

import re

_NAMES = {
    "mm": "millimeters? millimetres?",
    "cm": "centimeters? centimetres?",
    "dm": "decimeters? decimetres?",
    "m": "meters? metres? mtr",
    "km": "kilometers? kilometres? kms",
    "inch": "in inches inchs",
    "ft": "foot feet",
    "yd": "yards? yds",
    "mile": "miles mi",
    "mg": "milligrams?",
    "g": "grams? gm gms",
    "kg": "kilograms? kgs kilos?",
    "t": "tons? tonnes?",
    "lb": "lbs pounds?",
    "oz": "ounces?",
    "ml": "milliliters? millilitres? mL",
    "l": "liters? litres? L",
    "gallon": "gallons gal gals",
    "ms": "milliseconds?",
    "s": "seconds? secs?",
    "min": "minutes? mins",
    "h": "hours? hrs?",
    "day": "days",
    "week": "weeks",
    "month": "months",
    "year": "years yrs? years? old",
    "degree": "degrees degs?",
    "radian": "radians rad rads",
    "mph": "",
    "km/h": "kmph kmh kph",
    "m/s": "",
    "dollar": r"dollars \$ USD",
    "cent": "cents ¢",
    "euro": "euros € EUR",
    "pound sterling": "£ GBP",
    "rupee": "rupees ₹ Rs rs INR",
    "yen": "¥ JPY",
    "yuan": "CNY RMB",
    "percent": r"% percentage pct per\ cent",
    "N": "newtons?",
    "J": "joules?",
    "W": "watts?",
    "V": "volts?",
    "K": "kelvins?",
    "Hz": "hertz",
    "ohm": "ohms",
    "mol": "moles?",
    "unit": "units",
}
_CANONICAL = {
    variant: name
    for name, names in _NAMES.items()
    for word in names.split()
    for variant in ({word[:-1], word[:-2]} if word.endswith("?") else {word})
} | {name: name for name in _NAMES}
_SYMBOLS = "€£¥₹¢"
_CODES = "USD|EUR|GBP|INR|JPY|CNY|RMB|Rs"
_PREFIX = re.compile(rf"^([-+]?)\s*(\\\$|US\\\$|[{_SYMBOLS}]|(?:{_CODES})\b\.?)\s*(?=[\d.\\-])")
_PERCENT = re.compile(
    r"\s*(?:\\?%|\\text\{\s*(?:\\?%|percent|percentage|pct)\s*\}|(?<![A-Za-z])(?:percent(?:age)?|pct)\b)\.?$"
)
_ORDINAL = re.compile(r"(?<=\d)\s*\^?\s*\{?\s*(?:\\text\{\s*)?(?:st|nd|rd|th)\s*\}{0,2}$")
_ENDS_VALUE = r"(?<=[\d)}\]|!A-Za-z])"
_TEXT_TAIL = re.compile(
    _ENDS_VALUE + r"\s*\^?\s*((?:\s*[/·]?\s*(?:\\cdot\s*)?\\text\{[^{}]*\}(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?)+)\.?$"
)
_PLAIN_TAIL = re.compile(
    r"(?<=[\d)}])(\s*)((?:\^\\circ\s*[CF]|\\\$|[€£¥₹¢])|[A-Za-z]+(?:[ /.]+[A-Za-z]+)*\.?)"
    r"(\s*\^\s*(?:\{\s*\d\s*\}|\d))?$"
)
_NO_UNIT = re.compile(
    r"(?:and|or|to|in|is|of|not|none|pi|sqrt|sin|cos|tan|sec|csc|cot|ln|log|exp|mod|if|for|all|any|with|where|when|base)",
    re.IGNORECASE,
)


def split_unit(text: str) -> tuple[str, str]:
    r"""(value, unit) of a tidy answer; the unit is "" if there is none, "?" if it is a word that is no known unit."""
    value, unit = text, ""
    if match := _PREFIX.match(value):
        value, unit = match[1] + value[match.end() :], canonical(match[2])
    if match := _PERCENT.search(value):
        return value[: match.start()].strip(), "percent"
    if match := _ORDINAL.search(value):
        return value[: match.start()].strip(), unit
    if match := _TEXT_TAIL.search(value):
        if re.fullmatch(r"[-+]?[A-Za-z\\]*", value[: match.start()]):
            return text, ""  # a name with a text behind it, no value
        return value[: match.start()].strip(), unit or canonical(match[1])
    if (match := _PLAIN_TAIL.search(value)) and _is_unit(match[2], spaced=bool(match[1])):
        return value[: match.start()].strip(), unit or canonical(match[2] + (match[3] or ""))
    return value.strip(), unit


def canonical(unit: str) -> str:
    r"""One name for every way to write a unit: ``\text{ centimeters}^2``, "square cm" and "cm^2" give cm^2."""
    words = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", unit)
    words = re.sub(r"\^\s*\{?\s*(-?\d)\s*\}?", r"^\1", words).replace("^\\circ", "").replace("\\cdot", "")
    power = re.search(r"\b(square|sq|cubic|cu)\b\.?", words)
    words = re.sub(r"\b(?:square|sq|cubic|cu|per)\b\.?", lambda match: "/" if match[0] == "per" else "", words)
    if power and not words.strip():
        words = "unit"
    names = [_name(part.strip(" .")) for part in words.split("/")]
    if "?" in names:
        return "?"
    name = "/".join(names) + ({"sq": "^2", "cu": "^3"}[power[1][:2]] if power else "")
    return {"mile/h": "mph"}.get(name, name)


def units_agree(left: str, right: str) -> bool:
    """Whether two units can be the same: equal, or one missing or unknown."""
    return left == right or "" in (left, right) or "?" in (left, right)


def _name(word: str) -> str:
    base, power, exponent = word.partition("^")
    name = _CANONICAL.get(base.strip()) or _CANONICAL.get(base.strip().lower(), "?")
    return name if name == "?" else name + power + exponent


def _is_unit(words: str, spaced: bool) -> bool:
    """A known unit of two letters or more, or behind a space one of one letter or any longer word (apples)."""
    if not words[0].isalpha():
        return True
    parts = re.split(r"[ /.]+", words.strip("."))
    if any(map(_NO_UNIT.fullmatch, parts)):
        return False
    if canonical(words) != "?":
        return spaced or len(words) > 1
    return spaced and len(parts[0]) > 2
