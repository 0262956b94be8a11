r"""One way of writing for every way of writing: scripts, fonts, spacing, symbols and signs of an answer.

Nothing here changes a value. What cannot be told apart by a reader (a full-width 5, `\mathbf{5}`, `\,5`) is written
the same; what a reader tells apart (`f'` and `f`, `x` and `X`, ten percent and ten) stays apart.
"""

import re
import unicodedata
from functools import lru_cache
from itertools import accumulate

MAX_NESTING = 20
"""Depth of brackets beyond which an answer is only compared as a string; a parser's time may double with each."""
DOLLAR = "\N{FULLWIDTH DOLLAR SIGN}"
"""A dollar that is money, not one of LaTeX's, in a canonical text."""
_REMEMBERED = 4096

_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi chi"
    " psi omega"
).split()
GREEK = frozenset([*_GREEK, *map(str.capitalize, _GREEK)]) - {"pi"}
"""Names of Greek letters as commands; `pi` is a number."""

_COMMANDS = {
    "∞": "infty", "×": "times", "·": "cdot", "⋅": "cdot", "∙": "cdot", "÷": "div", "≤": "le", "≥": "ge", "⩽": "le",
    "⩾": "ge", "≠": "neq", "≈": "approx", "≃": "approx", "∪": "cup", "∩": "cap", "∈": "in", "∉": "notin",
    "∅": "emptyset", "Ø": "emptyset", "⌀": "emptyset", "±": "pm", "∓": "mp", "∠": "angle", "△": "triangle",
    "…": "ldots", "⋯": "ldots",
    "→": "to", "∖": "setminus", "ℝ": "mathbb{R}", "ℤ": "mathbb{Z}", "ℕ": "mathbb{N}", "ℚ": "mathbb{Q}",
    "ℂ": "mathbb{C}", "∑": "sum", "∏": "prod", "∫": "int", "∂": "partial", "⊂": "subset", "⊆": "subseteq",
    "ϕ": "phi", "ϵ": "epsilon", "ϑ": "theta", "Ω": "Omega",
}  # fmt: skip
_CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "‒": "-", "﹣": "-", "⁄": "/", "∕": "/", "∶": ":", "′": "'",
    "’": "'", "‘": "'", "″": "''", "°": r"^\circ ", "º": r"^\circ ", "℃": r"^\circ C", "℉": r"^\circ F", "。": ".",
    "、": ",", "µm": "um", "⟨": "(", "⟩": ")", "〈": "(", "〉": ")", "【": "[", "】": "]", "￥": "¥", "￡": "£",
    "\u200b": "", "\u200c": "", "\u200d": "", "\u2060": "", "\ufeff": "", "\u00ad": "",
}  # fmt: skip


def _squared_units() -> dict[str, str]:
    """㎝ as cm, ㎡ as m^2."""
    units = {chr(code): unicodedata.normalize("NFKC", chr(code)) for code in range(0x3380, 0x33E0)}
    return {sign: " " + re.sub("([a-z])([23])", r"\1^\2", name) for sign, name in units.items() if name.isascii()}


def _fractions() -> dict[str, str]:
    found = {}
    for code in (0xBC, 0xBD, 0xBE, *range(0x2150, 0x215F)):
        top, _, bottom = unicodedata.normalize("NFKC", chr(code)).partition("⁄")
        found[chr(code)] = rf"\frac{{{top}}}{{{bottom}}}"
    return found


_SYMBOLS = str.maketrans(
    {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
    | {symbol: rf"\{name} " for symbol, name in _COMMANDS.items()}
    | {unicodedata.lookup(f"GREEK SMALL LETTER {n.upper().replace('LAMBDA', 'LAMDA')}"): rf"\{n} " for n in _GREEK}
    | {
        unicodedata.lookup(f"GREEK CAPITAL LETTER {n.upper().replace('LAMBDA', 'LAMDA')}"): rf"\{n.capitalize()} "
        for n in ("gamma delta theta lambda xi pi sigma phi psi omega").split()
    }
    | {character: plain for character, plain in _CHARACTERS.items() if len(character) == 1}
    | _fractions()
    | _squared_units()
)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-")
_RAISED_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_LOWERED_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋]+")
_UNICODE_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|([0-9]+(?:\.[0-9]+)?|[A-Za-z]|\\[A-Za-z]+))")

_FONTS = (
    "text textbf textrm textit textnormal textsf texttt textsc textup textsl emph mathrm mathbf mathit mathsf mathtt"
    " mathnormal boldsymbol bm bold pmb mbox hbox underline unit si num ensuremath boxed fbox framebox"
    " mathop mathord mathrel"
)
_FONT = "|".join(sorted(_FONTS.split(), key=len, reverse=True))
_FONT_GROUP = re.compile(rf"\\(?:{_FONT})\*?\s*\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}")
_FONT_NAME = re.compile(rf"\\(?:{_FONT})(?![A-Za-z])\*?")
_COLOURED = re.compile(r"\\(?:textcolor|colorbox)\s*\{[^{}]*\}\s*\{([^{}]*)\}")
_WITH_ARGUMENT = re.compile(
    r"\\(?:textcolor|colorbox|color|bbox|hspace|vspace|phantom)\*?\s*(?:\[[^\[\]{}]*\]|\{[^{}]*\})"
)
_ANGLE = re.compile(r"\\ang\s*\{([0-9.]+)\}")
_POINTED = re.compile(r"\\(left|right)\s*([<>])")
_OPERATOR = re.compile(r"\\operatorname\*?\s*\{\s*([A-Za-z]+)\s*\}")
_QUANTITY = re.compile(r"\\(?:SI|qty)\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_DECLARATIONS = (
    "displaystyle textstyle scriptstyle scriptscriptstyle tiny scriptsize footnotesize small normalsize large Large"
    " LARGE huge Huge bf rm it sf tt sl limits nolimits left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl"
    " biggr Biggl Biggr bigm Bigm strut mathstrut nobreak relax noindent hfill centering"
)
_DECLARATION = re.compile(rf"\\(?:left|right)\s*\.|\\(?:{'|'.join(_DECLARATIONS.split())})(?![A-Za-z])")
_SPACE = re.compile(
    r"(?<!\\)\\(?:[,;:> ]|(?:quad|qquad|thinspace|medspace|thickspace|enspace|enskip|space|nobreakspace)(?![A-Za-z]))|~"
)
_NO_SPACE = re.compile(r"(?<!\\)\\(?:!|negthinspace(?![A-Za-z]))")

_SAME = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "sfrac": "frac", "nicefrac": "frac", "leq": "le", "geq": "ge",
    "leqslant": "le", "geqslant": "ge", "lt": "<", "gt": ">", "ne": "neq", "varnothing": "emptyset", "simeq": "approx",
    "thickapprox": "approx", "doteq": "approx", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "lbrace": r"\{",
    "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "langle": "(", "rangle": ")", "lparen": "(", "rparen": ")",
    "varepsilon": "epsilon", "varphi": "phi", "vartheta": "theta", "varrho": "rho", "colon": ":", "coloneqq": "=",
    "ast": "*", "dots": "ldots", "cdots": "ldots", "dotsc": "ldots", "degree": r"^\circ ", "percent": "%", "cent": "¢",
    "euro": "€", "pounds": "£", "textdollar": r"\$", "R": r"\mathbb{R}", "infin": "infty", "measuredangle": "angle",
    "bigtriangleup": "triangle", "vartriangle": "triangle", "prime": "'",
}  # fmt: skip
_SAME_COMMAND = re.compile(rf"\\({'|'.join(sorted(_SAME, key=len, reverse=True))})(?![A-Za-z])")
_PRIME = re.compile(r"\^\s*(?:\{\s*('+)\s*\}|('+))")
_OVER = re.compile(r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}")
_OLD_MATRIX = re.compile(r"\\(p|b)?matrix\s*\{([^{}]*)\}")
_SCRIPT = re.compile(r"([\^_])\s*\{\s*([0-9A-Za-z])\s*\}(?![0-9A-Za-z])")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_PLAIN_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)")
_PLAIN_NAME = re.compile(r"(?<![\\A-Za-z])(sqrt|pi|sin|cos|tan|log|ln|infty)(?![A-Za-z])")
_QUOTES = (("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"), ('"', '"'), ("'", "'"), ("“", "”"))
_BOARD = re.compile(r"\\(?:mathbb|Bbb)\s*(?:\{\s*([A-Z])\s*\}|([A-Z]))")
_EMPTY_GROUP = re.compile(r"(?<![A-Za-z}\]^_\\])\{\s*\}")


def depths(text: str) -> list[int]:
    """The depth of brackets after each character."""
    return list(accumulate((c in "([{") - (c in ")]}") for c in text))


def nesting(text: str) -> int:
    """The largest depth of brackets."""
    return max(depths(text), default=0)


def pieces(text: str, marks: str) -> list[str]:
    """What stands between those marks that stand in no bracket."""
    outside = [place for place, depth in enumerate(depths(text)) if depth == 0 and text[place] in marks]
    starts, ends = [0, *(place + 1 for place in outside)], [*outside, len(text)]
    return [text[start:end] for start, end in zip(starts, ends, strict=True)]


def letters(text: str) -> frozenset[str]:
    """Letters and Greek letters, the latter as their commands; those of other commands do not count."""
    greek = (name for name in _COMMAND.findall(text) if name in GREEK)
    return frozenset([*greek, *filter(str.isalpha, _COMMAND.sub(" ", text))])


def plain(text: str) -> str:
    r"""Characters of other scripts and styles as ASCII or commands: full-width, dashes, fractions, powers, Greek.

    Args:
      text: any.

    Returns:
      The same, in linear time: `５` as 5, `½` as `\frac{1}{2}`, `–` as -, `x²` as x^{2}, `∅` as `\emptyset`.
    """
    if text.isascii():
        return text
    text = _RAISED_RUN.sub(lambda run: f"^{{{run[0].translate(_RAISED)}}}", text)
    text = _LOWERED_RUN.sub(lambda run: f"_{{{run[0].translate(_LOWERED)}}}", text)
    text = text.replace("μm", "um").replace("µm", "um").translate(_SYMBOLS)
    return _UNICODE_ROOT.sub(lambda root: rf"\sqrt{{{root[1] or root[2] or root[3]}}}", text).replace("√", r"\sqrt ")


@lru_cache(maxsize=_REMEMBERED)
def canonical(text: str) -> str:
    r"""The one way of writing, words kept apart from what stands beside them.

    Args:
      text: an answer of bounded length, nested at most `MAX_NESTING` deep.

    Returns:
      Without fonts, sizes, colours, boxes and LaTeX's spacing, dollars, a full stop at the end; with one command of
      those that print the same. Single spaces.
    """
    text = _OLD_MATRIX.sub(r"\\begin{\1matrix}\2\\end{\1matrix}", plain(" ".join(text.split())))
    if "\\" in text or "~" in text:
        text = _without_fonts(text)
        text = _SAME_COMMAND.sub(_same_command, text)
        text = _PRIME.sub(lambda match: match[1] or match[2], text)
        text = _BOARD.sub(lambda match: rf"\mathbb{{{match[1] or match[2]}}}", text)
        text = _OVER.sub(r"\\frac{\1}{\2}", text)
    text = trim(text)
    text = _PLAIN_NAME.sub(r"\\\1", _PLAIN_ROOT.sub(r"\\sqrt{\1}", text))
    return " ".join(_SCRIPT.sub(r"\1\2", text).split())


def trim(text: str) -> str:
    """Without what encloses or ends an answer: dollars, LaTeX's brackets, Markdown's stars, a full stop.

    A dollar sign that is money becomes `DOLLAR`.
    """
    text = text.replace("{,}", ",").replace("{:}", ":").replace("\\$", DOLLAR).strip()
    for opened, closed in _QUOTES:
        if text.startswith(opened) and text.endswith(closed) and len(text) > len(opened + closed):
            text = text[len(opened) : -len(closed)].strip()
    text = text.replace("$", DOLLAR if text.count("$") == 1 else "").strip()
    return text.removesuffix("\\\\").removesuffix("\\").strip(" ,;").removesuffix(".").strip()


def _without_fonts(text: str) -> str:
    text = _POINTED.sub(lambda match: "(" if match[2] == "<" else ")", _ANGLE.sub(r"\1^\\circ", text))
    text = _OPERATOR.sub(r"\\\1 ", _COLOURED.sub(r" \1 ", _QUANTITY.sub(r"\1 \2", text)))
    text = _NO_SPACE.sub("", _WITH_ARGUMENT.sub(" ", text))
    text = _DECLARATION.sub("", text)
    while True:
        # From the inside out; each pass removes a level.
        bare = _FONT_GROUP.sub(r" \1 ", text)
        if bare == text:
            break
        text = bare
    return _EMPTY_GROUP.sub(" ", _SPACE.sub(" ", _FONT_NAME.sub(" ", text)))


def _same_command(match: re.Match[str]) -> str:
    same = _SAME[match[1]]
    return f"\\{same}" if same.isalpha() else same
