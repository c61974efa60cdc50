r"""Answers as models and data sets write them, rewritten as the plain LaTeX that math-verify reads.

Only what the library lacks: Unicode signs, plain-text functions, text wrappers, spacing, thousands separators,
repeating decimals, degrees, ±. Nothing here knows what an answer means.
"""

import re
from fractions import Fraction

from megatron_vcppo.rewards.tex_arguments import brace_arguments

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−–—‐‑", "-"),
        **dict.fromkeys("\u00a0\u2009\u202f\u2002\u2003\t\n\r", " "),
        **dict.fromkeys("“”„", '"'),
        **dict.fromkeys("‘’′", "'"),
        **dict(zip("：，；（）［］｛｝＝＋％", ":,;()[]{}=+%", strict=True)),
        **dict(zip("×·⋅∙÷≤≥≠≈±∓∞∪∩∈∅⌊⌋⌈⌉⟨⟩∖", (
            r"\times ", r"\cdot ", r"\cdot ", r"\cdot ", "/", r"\le ", r"\ge ", r"\ne ", r"\approx ", r"\pm ", r"\mp ",
            r"\infty ", r"\cup ", r"\cap ", r"\in ", r"\emptyset ", r"\lfloor ", r"\rfloor ", r"\lceil ", r"\rceil ",
            r"\langle ", r"\rangle ", r"\setminus ",
        ), strict=True)),
        **dict(zip("αβγδεθλμπρστφωΔ", (
            r"\alpha ", r"\beta ", r"\gamma ", r"\delta ", r"\epsilon ", r"\theta ", r"\lambda ", r"\mu ", r"\pi ",
            r"\rho ", r"\sigma ", r"\tau ", r"\phi ", r"\omega ", r"\Delta ",
        ), strict=True)),
        **dict(zip("ℝℤℚℕℂ", (rf"\mathbb{{{letter}}}" for letter in "RZQNC"), strict=True)),
        **dict(zip("½⅓⅔¼¾⅕⅙⅛", (
            rf"\frac{{{top}}}{{{bottom}}}"
            for top, bottom in ((1, 2), (1, 3), (2, 3), (1, 4), (3, 4), (1, 5), (1, 6), (1, 8))
        ), strict=True)),
        **dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹", (f"^{digit}" for digit in range(10)), strict=True)),
        "°": r"^\circ ",
        "…": r"\ldots ",
    }
)  # fmt: skip
_WRAPPER = re.compile(
    r"\\((?:text(?:bf|it|rm|sf|tt|sc|normal)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|operatorname\*?|boldsymbol|bm|emph"
    r"|underline|textcolor\{\w*\}))\s*\{([^{}]*)\}"
)
_FUNCTIONS = (
    "sqrt|sinh|cosh|tanh|sin|cos|tan|sec|csc|cot|arcsin|arccos|arctan|ln|log|exp|pi|theta|alpha|beta"
    "|lambda|infty|cup|cap|pm"
)
_FUNCTION_NAME = re.compile(rf"(?:{_FUNCTIONS}|gcd|lcm|max|min)")
_PLAIN_FUNCTION = re.compile(rf"(?<![\\A-Za-z])(?:(?:{_FUNCTIONS})(?![A-Za-z])|(?:gcd|lcm|max|min)(?=\s*\())")
_DROPPED = re.compile(
    r"\\(?:left|right|bigg?|Bigg?|bigl|bigr|displaystyle|textstyle|limits|nolimits|rm|bf|it|hfill|phantom\{[^{}]*\})"
    r"(?![A-Za-z])(?:\s*\.(?!\d))?"
)
_NEGATIVE_SPACE = re.compile(r"\\!\s*")
_SPACE = re.compile(
    r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|\\(?:thin|med|thick)?space(?![A-Za-z])|\\enspace|~|\\hspace\{[^{}]*\}"
)
_REPLACED = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:d|t|c)frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:d|t)binom(?![A-Za-z])", r"\\binom"),
        (r"\{\s*([^{}]*?)\s*\\choose\s*([^{}]*?)\s*\}", r"\\binom{\1}{\2}"),
        (r"\\(?:infin|text\{infinity\})(?![A-Za-z])", r"\\infty"),
        (r"(?<![\\A-Za-z])inf(?:inity)?(?![A-Za-z])", r"\\infty"),
        (r"\\(?:varnothing|O)(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\(?:langle|lt\b(?=[^=]*\\gt))(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"\\lg(?![A-Za-z])", r"\\log_{10}"),
        (r"\\(?:colon|mathbin\{:\})(?![A-Za-z])|\{:\}", ":"),
        (r"\\(?:lvert|rvert|vert|mid)(?![A-Za-z])", "|"),
        (r"\\(?:leqslant|leqq|leq)(?![A-Za-z])|<=|=<", r"\\le "),
        (r"\\(?:geqslant|geqq|geq)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\neq(?![A-Za-z])|!=", r"\\ne "),
        (r"\+\s*/?\s*-(?=\s*[\d.\\a-z(])", r"\\pm "),
        (r"\\lor(?![A-Za-z])|\\vee(?![A-Za-z])", " or "),
        (r"\\land(?![A-Za-z])|\\wedge(?![A-Za-z])|^([^&]*[^&\s])\s\\?&\s(?!.*\\end)", r"\1 and "),
        (r"(?<=[)\]}])\s*U\s*(?=[(\[\\{])", r" \\cup "),
        (r"^\s*([A-Za-z])\s+in\s+(?=[(\[\\{])", r"\1\\in "),
        (r"\\(?:to|rightarrow|implies|Rightarrow)(?![A-Za-z])", "="),
        (r"\*\*", "^"),
        (r"\^\s*(-?\d*\.\d+)", r"^{\1}"),
        (r"(?<=\d)[eE]([+-]?\d{1,4})(?![\d.])", r"\\cdot 10^{\1}"),
        (r"smallmatrix", "matrix"),
        (r"\\mathbb\s*([A-Z])", r"\\mathbb{\1}"),
        (r"\\frac\s*\{\s*\\text\{([^{}]*)\}\s*\}\s*\{\s*\\text\{([^{}]*)\}\s*\}", r"\\text{\1/\2}"),
        (r"^\\\{\s*[A-Za-z]\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\||:)(.*)\\\}$", r"\1"),
    )
]
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,^_{])([1-9]\d{0,2})((?:[ _']\d{3})+)(?![\d_'])")
_COMMA_THOUSANDS = re.compile(r"(?<![\d.,])([1-9]\d{0,2})((?:,\d{3})+)(?!,?\d)")
_BRACED_THOUSANDS = re.compile(r"(?<=\d)\{,\}(?=\d{3}(?!\d))")
_REPEATING = re.compile(
    r"(?<![\d.])(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{?(\d+)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?|\((\d+)\))"
)
_DOTTED = re.compile(r"(?<![\d.])(\d*)\.(\d*?)((\d+?)\4{1,})(?:\.{3}|\\(?:l|c)?dots(?![A-Za-z]))")
_MIXED = re.compile(r"(?<![\d.\w}^_/])(\d+)(?:\s+|-(?=\d+/\d+$))(\d+)\s*/\s*(\d+)(?![\d.])")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?|[A-Za-z)}])?\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|sec|csc|cot)(?![A-Za-z])")
_PRODUCT = re.compile(r"(?<=\))\s*(?=\()|(?<![_\d.^{,A-Za-z])(\d+(?:\.\d+)?)\s*(?=\(|\\binom)")


def tidy(answer: str) -> str:
    r"""The answer as plain LaTeX: no math delimiters, fonts, sizes and spacing commands; texts only as ``\text{…}``.

    "$\left\{ \dfrac12 ,\, \mathrm{B} \right\}$." becomes "\{ \frac12 , B \}". Commas between thousands stay:
    see ``join_thousands``.
    """
    text = re.sub(r"√\s*(\d+(?:\.\d+)?|[A-Za-z])", r"\\sqrt{\1}", answer).replace("√", r"\sqrt ")
    text = _delimiters(text.translate(_CHARACTERS))
    text = _SPACE.sub(" ", _NEGATIVE_SPACE.sub("", text))
    text = _DROPPED.sub("", text)
    for _ in range(3):  # wrappers inside wrappers
        text, count = _WRAPPER.subn(_unwrapped, text)
        if not count:
            break
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    text = brace_arguments(text)
    text = _PLAIN_FUNCTION.sub(lambda match: "\\" + match[0] + " ", text)
    text = _roots(text)
    text = _BRACED_THOUSANDS.sub("", text)
    text = _SPACED_THOUSANDS.sub(lambda match: match[1] + re.sub(r"[ _']", "", match[2]), text)
    text = _DOTTED.sub(lambda match: _fraction(match[1], match[2], match[4]), text)
    text = _REPEATING.sub(_repeating, text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    return re.sub(r"\s+", " ", text).lstrip(" ,;").rstrip(" .,;\\")


def join_thousands(text: str) -> str:
    """Without commas between thousands: 1,234,567. Inside brackets a comma separates: (1,234) stays."""
    if re.search(r"[(\[{]", text):
        return text
    return _COMMA_THOUSANDS.sub(lambda match: match[1] + match[2].replace(",", ""), text)


def for_library(text: str) -> str:
    r"""The last rewriting before math-verify: degrees, and products that it takes for mixed numbers (3(4) is no 7).

    Degrees inside trigonometric functions become radians; elsewhere the sign goes.
    """
    radians = _TRIGONOMETRY.search(text)

    def degrees(match: re.Match[str]) -> str:
        if not radians:
            return match[1] or ""
        if match[1] and match[1][0].isdigit():
            return rf"{{\frac{{{match[1]}\pi}}{{180}}}}"
        return rf"{match[1] or ''}\cdot\frac{{\pi}}{{180}}"

    text = _DEGREES.sub(degrees, text)
    return _PRODUCT.sub(lambda match: (match[1] or "") + r"\cdot ", text)


def has_degrees(text: str) -> bool:
    """Whether the text is an angle in degrees, not a function of one."""
    return bool(_DEGREES.search(text)) and not _TRIGONOMETRY.search(text)


def split_top(text: str, separators: str) -> list[str]:
    """The parts between the separators (a regular expression) that stand outside of all brackets."""
    parts, depth, start, place = [], 0, 0, 0
    token = re.compile(rf"(?P<separator>{separators})|\\begin|\\end|\\[{{}}]|\\[A-Za-z]+|[()\[\]{{}}]|.", re.DOTALL)
    while match := token.match(text, place):
        piece = match[0]
        if match["separator"] and depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
        elif not match["separator"]:
            depth += piece in ("(", "[", "{", r"\{", r"\begin")
            depth -= piece in (")", "]", "}", r"\}", r"\end")
        place = match.end() if match.end() > place else place + 1
    return [part.strip() for part in [*parts, text[start:]]]


def expand_signs(text: str) -> list[str]:
    r"""``1 \pm x`` as ["1 + x", "1 - x"]; other texts as [text]."""
    if r"\pm" not in text and r"\mp" not in text:
        return [text]
    upper = re.sub(r"\\pm(?![A-Za-z])", "+", re.sub(r"\\mp(?![A-Za-z])", "-", text))
    lower = re.sub(r"\\pm(?![A-Za-z])", "-", re.sub(r"\\mp(?![A-Za-z])", "+", text))
    return [re.sub(r"(^|[=({,])\s*\+\s*", r"\1", variant) for variant in (upper, lower)]


def _delimiters(text: str) -> str:
    r"""Without what encloses an answer: ``$``, ``\(``, ``\[``, markdown's stars and ticks, quotes. ``\$`` is money."""
    text = re.sub(r"\\[()]|\\\[|(?<!\\)\\\](?!\[)", " ", text)
    text = text.strip().strip('`"').strip()
    text = re.sub(r"^\*{2,3}(.*?)\*{2,3}\.?$", r"\1", text)
    text = re.sub(r"^[*_](?=\S)(.*?)[*_]$", r"\1", text)
    if r"\$" not in text and text.count("$") % 2:
        return text.replace("$", r"\$")
    return re.sub(r"(?<!\\)\$", "", text)


def _unwrapped(match: re.Match[str]) -> str:
    command, content = match[1], match[2].strip()
    if _FUNCTION_NAME.fullmatch(content):
        return f"\\{content} "
    if re.fullmatch(r",? ?(?:and|or)", content):
        return f" {content} "
    before = match.string[: match.start()].rstrip(" \\,;:~")[-1:]
    if re.fullmatch(r"[A-Za-z]", content) and command[-2:] in ("xt", "rm", "ox") and content not in "ei":
        # A letter in a text font behind a value is a unit: 10\text{ m}.
        return rf"\text{{{content}}}" if re.fullmatch(r"[\d})]", before) else content
    if re.fullmatch(r"\(?[A-Za-z]\)?|[-\d.,\s()]+|\\?[%$]|", content):
        return content
    if re.fullmatch(r"[0-9A-F]+", content) and match.string[match.end() : match.end() + 1] == "_":
        return content  # digits of a number in another base
    return rf"\text{{{content}}}"


def _roots(text: str) -> str:
    r"""``\sqrt (…)`` as ``\sqrt{…}``, brackets matched."""
    while match := re.search(r"\\sqrt\s*\(", text):
        depth, place = 1, match.end()
        while place < len(text) and depth:
            depth += {"(": 1, ")": -1}.get(text[place], 0)
            place += 1
        if depth:
            return text
        text = rf"{text[: match.start()]}\sqrt{{{text[match.end() : place - 1]}}}{text[place:]}"
    return text


def _repeating(match: re.Match[str]) -> str:
    if match[6]:
        return _fraction(match[1], match[2], match[6])
    if "\\dot" in match[0]:
        return _fraction(match[1], match[2], (match[3] or "") + (match[4] or "") + (match[5] or ""))
    return _fraction(match[1], match[2], match[3])


def _fraction(whole: str, digits: str, period: str) -> str:
    """whole.digits(period) as a fraction."""
    if len(period) + len(digits) > 200:
        return f"{whole}.{digits}{period}"
    value = Fraction(int((whole or "0") + digits + period) - int((whole or "0") + digits or "0"))
    value /= 10 ** len(digits) * (10 ** len(period) - 1)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
