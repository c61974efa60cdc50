r"""The value of a LaTeX or plain expression: + - * / ^, \frac, \sqrt, \pi, functions, implied products.

Rationals stay exact (Fraction); roots and transcendental numbers are floats.
"""

import math
import re
from collections.abc import Mapping
from fractions import Fraction

Number = Fraction | float

_MAX_POWER = 4096
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d+(?![\d.]))?|\.\d+)|(?P<command>\\[A-Za-z]+)"
    r"|(?P<word>sqrt|pi|sin|cos|tan|ln|log|exp)(?![A-Za-z])"
    r"|(?P<letter>[A-Za-z])|(?P<sign>\*\*|[-+*/^!|(){}\[\]]|[−×÷·]))"
)
_SIGNS = {"−": "-", "×": "*", "·": "*", "÷": "/", "**": "^", "{": "(", "}": ")"}
_COMMANDS = {r"\times": "*", r"\div": "/"}
_FUNCTIONS = {
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "ln": math.log,
    "log": math.log10,
    "exp": math.exp,
}


class NotAnExpression(ValueError):
    """The text is not one that this evaluator reads."""


def variables(text: str) -> frozenset[str]:
    """The letters that stand for something unknown."""
    letters = {match["letter"] for match in _TOKEN.finditer(text) if match["letter"]}
    return frozenset(letters)


def evaluate(text: str, values: Mapping[str, float]) -> Number:
    """The value with these values of the variables. Raises NotAnExpression for anything that it cannot read."""
    parser = _Parser(_tokens(text), values)
    try:
        result = parser.sum()
    except (ArithmeticError, ValueError, TypeError, RecursionError) as error:
        raise NotAnExpression(f"{text!r}: {error}") from error
    if parser.peek():
        raise NotAnExpression(f"{text!r}: unexpected {parser.peek()!r}")
    if isinstance(result, float) and not math.isfinite(result):
        raise NotAnExpression(f"{text!r} is not finite")
    return result


def _tokens(text: str) -> list[str]:
    tokens, place = [], 0
    text = text.strip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise NotAnExpression(f"{text!r}: unexpected {text[place:][:1]!r}")
        token = match[0].strip()
        command = token.removeprefix("\\")
        if token.startswith("\\") and command in ("pi", "sqrt", *_FUNCTIONS):
            token = command
        tokens.append(_SIGNS.get(token, _COMMANDS.get(token, token)))
        place = match.end()
    return tokens


class _Parser:
    r"""Recursive descent: sum → product → power → atom. A product may leave out its sign: 2\sqrt{3}, 2(x+1)."""

    def __init__(self, tokens: list[str], values: Mapping[str, float]) -> None:
        self._tokens, self._place, self._values = tokens, 0, values

    def peek(self) -> str:
        return self._tokens[self._place] if self._place < len(self._tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            raise NotAnExpression(f"expected {expected or 'more'}, found {token or 'the end'}")
        self._place += 1
        return token

    def sum(self) -> Number:
        result = self.product()
        while self.peek() in ("+", "-"):
            sign, term = self.take(), self.product()
            result = result + term if sign == "+" else result - term
        return result

    def product(self) -> Number:
        result = self.signed()
        while (token := self.peek()) and token not in ("+", "-", ")", "]", "^", "!", "|"):
            if token == "/":
                self.take()
                result = result / self.signed()
                continue
            if token == "*":
                self.take()
                result = result * self.signed()
                continue
            if token[0].isdigit():
                raise NotAnExpression("two numbers with nothing between them")
            mixed = token == r"\frac" and re.fullmatch(r"\d+", self._tokens[self._place - 1])
            factor = self.power()
            result = result + factor if mixed else result * factor  # 1\frac{1}{2} is one and a half
        return result

    def signed(self) -> Number:
        if self.peek() in ("+", "-"):
            return self.signed() if self.take() == "+" else -self.signed()
        return self.power()

    def power(self) -> Number:
        base: Number = self.atom()
        while self.peek() == "!":
            self.take()
            if not isinstance(base, Fraction) or base.denominator != 1 or not 0 <= base <= 500:
                raise NotAnExpression(f"factorial of {base}")
            base = Fraction(math.factorial(int(base)))
        if self.peek() != "^":
            return base
        self.take()
        exponent = self.signed() if self.peek() in ("+", "-") else self.power()
        if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
            if abs(exponent) > _MAX_POWER or max(abs(base.numerator), base.denominator).bit_length() > 512:
                raise NotAnExpression(f"too large a power: {exponent}")
            return Fraction(base ** int(exponent))
        return math.pow(base, exponent)

    def atom(self) -> Number:
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            return self._number(token)
        if token in ("(", "["):
            result = self.sum()
            self.take(")" if token == "(" else "]")
            return result
        if token == "|":
            inner = self.sum()
            self.take("|")
            return -inner if inner < 0 else inner
        if token == r"\frac":
            return self.argument() / self.argument()
        if token == "sqrt":
            return self.root()
        if token == "pi":
            return math.pi
        if token in _FUNCTIONS:
            return _FUNCTIONS[token](self.power())
        if token in self._values:
            return self._values[token]
        raise NotAnExpression(f"unknown {token}")

    def argument(self) -> Number:
        r"""What a LaTeX command takes: a group, or one character (\frac12)."""
        token = self.peek()
        if token.isdigit() and len(token) > 1:
            self._tokens[self._place : self._place + 1] = [token[0], token[1:]]
        return self.atom()

    def root(self) -> Number:
        degree: Number = Fraction(2)
        if self.peek() == "[":
            degree = self.atom()
        radicand = self.atom()
        if isinstance(radicand, Fraction) and degree == 2 and radicand >= 0:
            top, bottom = math.isqrt(radicand.numerator), math.isqrt(radicand.denominator)
            if top * top == radicand.numerator and bottom * bottom == radicand.denominator:
                return Fraction(top, bottom)
        if radicand < 0 and isinstance(degree, Fraction) and degree.denominator == 1 and degree.numerator % 2:
            return -math.pow(-radicand, 1 / degree)
        return math.pow(radicand, 1 / degree)

    @staticmethod
    def _number(token: str) -> Fraction:
        if len(token) > 400 or ("e" in token.lower() and abs(int(re.split("[eE]", token)[1])) > 400):
            raise NotAnExpression("too long a number")
        return Fraction(token)
