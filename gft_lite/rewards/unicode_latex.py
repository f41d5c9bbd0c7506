r"""Unicode characters in answers, rewritten as LaTeX or ASCII: `½` -> `\frac{1}{2}`.

The properties of the Unicode character database decide: decompositions, categories, decimal
values and names. Only the LaTeX commands of mathematical symbols are listed here.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from itertools import groupby

#: LaTeX by Unicode name.
_SYMBOLS = {
    "PLUS-MINUS SIGN": r"\pm ",
    "MINUS-OR-PLUS SIGN": r"\mp ",
    "MULTIPLICATION X": r"\times ",
    "HEAVY MULTIPLICATION X": r"\times ",
    "VECTOR OR CROSS PRODUCT": r"\times ",
    "MIDDLE DOT": r"\cdot ",
    "DOT OPERATOR": r"\cdot ",
    "BULLET": r"\cdot ",
    "BULLET OPERATOR": r"\cdot ",
    "ASTERISK OPERATOR": "*",
    "FRACTION SLASH": "/",
    "DIVISION SLASH": "/",
    "RATIO": ":",
    "MASCULINE ORDINAL INDICATOR": r"^{\circ}",
    "RING ABOVE": r"^{\circ}",
    "RING OPERATOR": r"^{\circ}",
    "PRIME": "'",
    "FULLWIDTH TILDE": r"\sim ",
    "TILDE OPERATOR": r"\sim ",
    "HYPHEN BULLET": "-",
    "INCREMENT": r"\Delta ",
    "DIVIDES": "|",
    "INFINITY": r"\infty ",
    "LESS-THAN OR EQUAL TO": r"\le ",
    "LESS-THAN OVER EQUAL TO": r"\le ",
    "LESS-THAN OR SLANTED EQUAL TO": r"\le ",
    "GREATER-THAN OR EQUAL TO": r"\ge ",
    "GREATER-THAN OVER EQUAL TO": r"\ge ",
    "GREATER-THAN OR SLANTED EQUAL TO": r"\ge ",
    "NOT EQUAL TO": r"\ne ",
    "UNION": r"\cup ",
    "INTERSECTION": r"\cap ",
    "ELEMENT OF": r"\in ",
    "EMPTY SET": r"\emptyset ",
}
#: Signs by the end of their name: HEAVY MINUS SIGN, ARABIC COMMA, IDEOGRAPHIC FULL STOP, ...
_SIGNS = {
    "MINUS SIGN": "-",
    "PLUS SIGN": "+",
    "EQUALS SIGN": "=",
    "PERCENT SIGN": "%",
    "MULTIPLICATION SIGN": r"\times ",
    "DIVISION SIGN": r"\div ",
    "DEGREE SIGN": r"^{\circ}",
    "DECIMAL SEPARATOR": ".",
    "THOUSANDS SEPARATOR": ",",
    "FULL STOP": ".",
    "COMMA": ",",
    "SEMICOLON": ";",
    "COLON": ":",
}
#: By general category: dashes, spaces, line ends, format and control characters, currencies.
_CATEGORIES = {"Pd": "-", "Zs": " ", "Zl": "\n", "Zp": "\n", "Cf": "", "Cc": "", "Sc": r"\$"}
_NO_LATEX = {"OMICRON", "Alpha", "Beta", "Epsilon", "Zeta", "Eta", "Iota", "Kappa", "Mu", "Nu",
             "Omicron", "Rho", "Tau", "Chi"}  # fmt: skip
_GREEK = re.compile(r"GREEK (SMALL|CAPITAL) LETTER ([A-Z]+)")
_DOUBLE_STRUCK = re.compile(r"(?:MATHEMATICAL )?DOUBLE-STRUCK CAPITAL ([A-Z])")
_SLANTED_FRACTION = re.compile(r"\^\{(\d+)\}/_\{(\d+)\}")
_ROOT = re.compile(r"([\u221a-\u221c])\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[A-Za-z]))")
_ROOTS = {"\N{SQUARE ROOT}": r"\sqrt", "\N{CUBE ROOT}": r"\sqrt[3]", "\N{FOURTH ROOT}": r"\sqrt[4]"}


def to_latex(text: str) -> str:
    """Rewrite all characters outside ASCII that have an equivalent in LaTeX or ASCII."""
    if text.isascii():
        return text
    parts = []
    for script, run in groupby(unicodedata.normalize("NFC", text), key=_script):
        latex = "".join(map(_latex, run))
        parts.append(f"{script}{{{latex}}}" if script else latex)
    latex = _SLANTED_FRACTION.sub(r"\\frac{\1}{\2}", "".join(parts))
    return _ROOT.sub(lambda root: f"{_ROOTS[root[1]]}{{{root[2] or root[3] or root[4]}}}", latex)


def to_plain_text(text: str) -> str:
    """Replace full-width and other compatibility characters, and remove invisible ones."""
    if text.isascii():
        return text
    text = unicodedata.normalize("NFKC", text)
    return "".join(char for char in text if char.isascii() or unicodedata.category(char) != "Cf")


@lru_cache(maxsize=4096)
def _script(char: str) -> str:
    """`^` for a superscript, `_` for a subscript, else empty."""
    kind = unicodedata.decomposition(char).partition(" ")[0]
    if unicodedata.category(char) not in ("No", "Sm", "Lm", "Ps", "Pe"):
        return ""
    return {"<super>": "^", "<sub>": "_"}.get(kind, "")


@lru_cache(maxsize=4096)
def _latex(char: str) -> str:
    name, category = unicodedata.name(char, ""), unicodedata.category(char)
    if char.isascii():
        return char
    if (symbol := _symbol(name)) is not None:
        return symbol
    if category == "Nd":
        return str(unicodedata.decimal(char))
    if category in _CATEGORIES:
        return _CATEGORIES[category]
    if category in ("Pi", "Pf"):
        return '"' if "DOUBLE" in name else "'"
    if name.startswith("VARIATION SELECTOR"):
        return ""
    kind, _, codes = unicodedata.decomposition(char).partition(" ")
    if not kind.startswith("<"):
        return char
    expanded = "".join(chr(int(code, 16)) for code in codes.split())
    if kind == "<fraction>":
        above, below = expanded.split("\N{FRACTION SLASH}")
        return rf"\frac{{{above}}}{{{below}}}" if below else f"^{{{above}}}/"
    return to_latex(expanded)


def _symbol(name: str) -> str | None:
    """The LaTeX of a symbol or a letter by its Unicode name."""
    if name in _SYMBOLS:
        return _SYMBOLS[name]
    words = name.split()
    for length in (1, 2):
        if (sign := _SIGNS.get(" ".join(words[-length:]))) is not None:
            return sign
    if match := _DOUBLE_STRUCK.fullmatch(name):
        return rf"\mathbb{{{match[1]}}}"
    if match := _GREEK.fullmatch(name):
        letter = match[2].replace("LAMDA", "LAMBDA")
        letter = letter.lower() if match[1] == "SMALL" else letter.capitalize()
        return None if letter in _NO_LATEX else rf"\{letter} "
    return None
