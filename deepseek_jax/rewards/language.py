"""Language: how much of the chain of thought is in the language asked for?"""

import re
import unicodedata
from collections import Counter
from functools import cache, lru_cache
from itertools import groupby
from typing import Any

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from deepseek_jax.rewards.protocol import RewardFunction, check_strings
from deepseek_jax.text.think import opens_thought, split_thinking

# What is no language: code, LaTeX, addresses. The bounds keep many openings without an end from taking quadratic time.
_NO_WORDS = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?(?:\$\$|\Z)|\$[^$\n]*\$|\\\[.{0,500}?\\\]|\\\(.{0,500}?\\\)"
    r"|\\begin\s{0,9}\{(\w{1,20}\*?)\}.{0,500}?\\end\s{0,9}\{\1\}|\\[A-Za-z]+|https?://\S+",
    re.DOTALL,
)
# Names with digits or underscores in them are code too; a number beside a letter of a script without spaces is none.
_NAME = re.compile(r"[^\W\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+")
_SENTENCE = re.compile(r"[.!?。！？…:;\n]+")
_MIN_WORDS = 6
_MIN_WORDS_AT_ALL = 3
_MAX_CHARS = 200_000

# Scripts that put no spaces between words: each character counts as one.
_UNSPACED = frozenset("HAN KANA THAI LAO KHMER MYANMAR".split())
_SCRIPTS = {
    "zh": {"HAN"}, "ja": {"HAN", "KANA"}, "ko": {"HANGUL"}, "th": {"THAI"}, "lo": {"LAO"}, "km": {"KHMER"},
    "my": {"MYANMAR"}, "el": {"GREEK"}, "he": {"HEBREW"}, "hy": {"ARMENIAN"}, "ka": {"GEORGIAN"}, "am": {"ETHIOPIC"},
    "ta": {"TAMIL"}, "te": {"TELUGU"}, "kn": {"KANNADA"}, "ml": {"MALAYALAM"}, "gu": {"GUJARATI"}, "pa": {"GURMUKHI"},
    "si": {"SINHALA"}, "or": {"ORIYA"},
    **dict.fromkeys(("bn", "as"), {"BENGALI"}),
    **dict.fromkeys(("ru", "uk", "bg", "be", "mk", "sr", "kk", "ky", "mn", "tg", "tt", "ba"), {"CYRILLIC"}),
    **dict.fromkeys(("ar", "fa", "ur", "ps", "ug"), {"ARABIC"}),
    **dict.fromkeys(("hi", "mr", "ne", "sa"), {"DEVANAGARI"}),
    **dict.fromkeys(
        ("en", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "no", "fi", "pl", "cs", "sk", "sl", "hr", "hu", "ro",
         "tr", "vi", "id", "ms", "tl", "ca", "gl", "eu", "et", "lv", "lt", "is", "ga", "cy", "sq", "az", "uz", "sw",
         "af", "la", "eo"),
        {"LATIN"},
    ),
}  # fmt: skip
LANGUAGES = tuple(sorted(_SCRIPTS))
"""Codes of the languages that `language_reward` knows (ISO 639-1)."""
_SCRIPT_NAMES = {
    **dict.fromkeys(("CJK", "IDEOGRAPHIC"), "HAN"),
    **dict.fromkeys(("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"), "KANA"),
}
_SHARED_SCRIPTS = frozenset("LATIN CYRILLIC ARABIC DEVANAGARI BENGALI".split())


def language_reward(*, language: str | None) -> RewardFunction:
    """Makes the reward of language consistency: the share of words of the thought that are in the language.

    The thought is what stands in the think tags, or before `</think>` where the prompt opened them. Code, LaTeX,
    numbers and single letters of alphabets are no words; in scripts written without spaces each character is one.

    A word whose script the language does not use is not in it. Where several languages share the script (Latin,
    Cyrillic, Arabic, Devanagari, Bengali), py3langid names the language of the sentence, joined with the ones after it
    until there are six words; of a thought with fewer than three such words their script alone decides. Han characters
    in a sentence with kana are Japanese.

    A thought without words scores 0.0, not None and not 1.0: else the surest way to be consistent would be silence,
    and the mean that is logged would leave out whoever does not think.

    Args:
      language: one of `LANGUAGES`, for example "en" or "zh"; None takes that of each row's column `language`.

    Returns:
      A reward function from 0.0 to 1.0, None only where a row's own language is; the same for the same text at all
      times. Of a thought of more than 200,000 characters the first ones count.

    Raises:
      ValueError: an unknown language, or a row's, or no such column.

    Source: DeepSeek-R1 paper, section 2.3.2 (language consistency); adbar/py3langid.
    Differs: the paper does not say how words are attributed.
    """
    if language is not None:
        _check_known(language)

    def reward(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        check_strings("language_reward", prompts, completions)
        if language is None and "language" not in columns:
            raise ValueError("language_reward: got no column 'language', wanted each row's; or name one language")
        wanted = columns["language"] if language is None else [language] * len(completions)
        for each in {of for of in wanted if of is not None}:
            _check_known(each)
        thoughts = [
            split_thinking(completion, opened=opens_thought(prompt))[0]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return [
            None if of is None else language_share(thought, of) or 0.0
            for thought, of in zip(thoughts, wanted, strict=True)
        ]

    return reward


def _check_known(language: Any) -> None:
    if language not in LANGUAGES:
        raise ValueError(
            f"language_reward: language: got {language!r:.80}, wanted one of {', '.join(LANGUAGES)}; "
            "use its two letters"
        )


def written_in(text: str) -> tuple[str, float] | None:
    """The language of most of a text's words, and the share of the words that are in its script.

    Returns:
      One of `LANGUAGES` (by py3langid where several share the script) and a share in (0, 1]; None where there are
      fewer than three words. Of a text of more than 200,000 characters the first ones count.
    """
    words = _words(_plain(text[:_MAX_CHARS]))
    if len(words) < _MIN_WORDS_AT_ALL:
        return None
    counts = Counter(script for _, script in words)
    script, _ = max(counts.items(), key=lambda item: (item[1], item[0]))
    scripts = {"HAN", "KANA"} if script in ("HAN", "KANA") else {script}
    share = sum(counts[each] for each in scripts) / len(words)
    if script in _SHARED_SCRIPTS:
        own = " ".join(word for word, of in words if of == script)
        return str(_identifier().classify(own)[0]), share
    if scripts == {"HAN", "KANA"}:
        return ("ja" if counts["KANA"] else "zh"), share
    return next((code for code, of in _SCRIPTS.items() if of == scripts), script.casefold()), share


def language_share(text: str, language: str, *, sure_from: int = 0) -> float | None:
    """The share of a text's words that are in a language, as `language_reward` tells them; None where it has none.

    Args:
      text: a thought.
      language: one of `LANGUAGES`.
      sure_from: of a text of fewer words the script alone decides: py3langid errs on short ones.
    """
    sentences = [_words(sentence) for sentence in _SENTENCE.split(_plain(text[:_MAX_CHARS]))]
    total = sum(map(len, sentences))
    if not total:
        return None
    scripts = _SCRIPTS[language]
    fitting = [_fitting(words, scripts, language) for words in sentences]
    if not scripts & _SHARED_SCRIPTS or total < sure_from:
        return sum(map(len, fitting)) / total
    return sum(len(words) for words in _passages(fitting) if _is_in(words, language)) / total


def _plain(thought: str) -> str:
    text = _NO_WORDS.sub(" ", unicodedata.normalize("NFC", thought))
    return _NAME.sub(lambda match: match[0] if match[0].isalpha() else " ", text)


def _words(sentence: str) -> list[tuple[str, str]]:
    """(word, script) of each word; of each character where there are no spaces."""
    found: list[tuple[str, str]] = []
    for script, characters in groupby(sentence, _script):
        word = "".join(characters)
        if script in _UNSPACED:
            found += [(character, script) for character in word if character.isalpha()]
        elif script and len(word) > 1:
            found.append((word, script))
    return found


def _fitting(words: list[tuple[str, str]], scripts: set[str], language: str) -> list[str]:
    japanese = any(script == "KANA" for _, script in words)
    if language == "zh" and japanese:
        return []
    return [word for word, script in words if script in scripts]


def _passages(sentences: list[list[str]]) -> list[list[str]]:
    """Sentences joined until they have words enough to tell their language; a short rest joins the last."""
    passages: list[list[str]] = []
    for words in sentences:
        if passages and len(passages[-1]) < _MIN_WORDS:
            passages[-1] = passages[-1] + words
        else:
            passages.append(words)
    if len(passages) > 1 and len(passages[-1]) < _MIN_WORDS:
        rest = passages.pop()
        passages[-1] = passages[-1] + rest
    return passages


def _is_in(words: list[str], language: str) -> bool:
    return len(words) < _MIN_WORDS_AT_ALL or _identifier().classify(" ".join(words))[0] == language


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE)


@lru_cache(maxsize=65536)
def _script(character: str) -> str:
    """The script of a letter or its mark, by the first word of its Unicode name; "" for anything else."""
    if unicodedata.category(character)[0] not in "LM":
        return ""
    name = unicodedata.name(character, "").split(" ")[0]
    return _SCRIPT_NAMES.get(name, name)
