"""Values of language consistency: scripts first, py3langid where languages share one, and nothing for silence."""

import time

import pytest

from deepseek_jax.rewards.language import LANGUAGES, language_reward, language_share

EN = "First, let us find the sum of the digits. Then we check whether the result is divisible by three."
DE = "Zuerst bestimmen wir die Summe der Ziffern. Dann prüfen wir, ob das Ergebnis durch drei teilbar ist."
FR = "Calculons d'abord la somme des chiffres. Ensuite nous vérifions si le résultat est divisible par trois."
ZH = "首先我们计算各位数字之和，然后检查结果是否能被三整除。"
JA = "まず各桁の数字の和を計算し、結果が三で割り切れるかどうかを確認します。"
RU = "Сначала найдём сумму цифр числа. Затем проверим, делится ли результат на три без остатка."
UK = "Спочатку знайдемо суму цифр цього числа. Потім перевіримо, чи ділиться отриманий результат на три."
HI = "पहले हम अंकों का योग निकालते हैं और फिर जाँचते हैं कि परिणाम तीन से विभाज्य है या नहीं।"
KO = "먼저 각 자리 숫자의 합을 구한 다음 결과가 삼으로 나누어지는지 확인합니다."
TH = "ก่อนอื่นเราหาผลรวมของตัวเลขแล้วตรวจสอบว่าหารด้วยสามลงตัวหรือไม่"
TEXTS = {"en": EN, "de": DE, "fr": FR, "zh": ZH, "ja": JA, "ru": RU, "uk": UK, "hi": HI, "ko": KO, "th": TH}


def share(thought, language="en"):
    (score,) = language_reward(language=language)([""], [f"<think>{thought}</think>4"], [[]], answer=["4"])
    return score


@pytest.mark.parametrize("written", TEXTS)
@pytest.mark.parametrize("wanted", TEXTS)
def test_each_language_is_itself_and_no_other(written, wanted):
    # Chinese text is Han, which Japanese writes too: only kana tell them apart.
    expected = 1.0 if written == wanted or (written, wanted) == ("zh", "ja") else 0.0
    assert share(TEXTS[written], wanted) == expected


def test_mixed_scripts_are_shared_by_words():
    english = "we add the two numbers and find the sum now"
    assert share(f"{english} 十个汉字在这里出现了。") == pytest.approx(10 / 20, abs=1e-12)
    assert share(f"{english} 十个汉字在这里出现了。", "zh") == pytest.approx(10 / 20, abs=1e-12)


def test_mixed_latin_languages_are_told_apart_by_sentence():
    expected = len(EN.split()) / (len(EN.split()) + len(DE.split()))
    assert share(f"{EN} {DE}") == pytest.approx(expected, abs=1e-12)
    assert share(f"{EN} {DE}", "de") == pytest.approx(1 - expected, abs=1e-12)


@pytest.mark.parametrize(
    "noise",
    [
        r"$\text{sum} = \alpha + \beta$",
        r"\[ \int_0^1 Funktion(x)\,dx \]",
        r"\begin{align} wert &= zahl \end{align}",
        "```python\nfor zahl in liste: drucken(zahl)\n```",
        "`zahl_der_ziffern`",
        "3 + 4 = 7",
        "x1 y_2 ab12cd",
        "https://beispiel.example/seite",
        "x y z α β",
    ],
)
def test_code_latex_and_numbers_are_no_words(noise):
    assert share(f"{EN} {noise} {EN}") == 1.0
    assert share(f"{ZH}{noise}{ZH}", "zh") == 1.0


@pytest.mark.parametrize("thought", ["", "  \n", "3 + 4 = 7", "$x$", "!!!", "```\nsecret talk\n```", "x"])
def test_silence_earns_nothing(thought):
    assert share(thought) == 0.0


def test_only_the_thought_counts():
    reward = language_reward(language="en")
    completions = [f"<think>{EN}</think>{ZH}", f"<think>{ZH}</think>{EN}", EN, f"{EN}</think>{ZH}"]
    assert reward([""] * 4, completions, [[]] * 4) == [1.0, 0.0, 0.0, 0.0]
    assert reward(["<think>\n"], [f"{EN}</think>{ZH}"], [[]]) == [1.0]


def test_the_same_text_has_the_same_score():
    texts = [f"<think>{text}</think>" for text in TEXTS.values()]
    reward = language_reward(language="en")
    scores = reward([""] * len(texts), texts, [[]] * len(texts))
    backwards = reward([""] * len(texts), texts[::-1], [[]] * len(texts))
    assert scores == backwards[::-1] == reward([""] * len(texts), texts, [[]] * len(texts))


@pytest.mark.parametrize(
    "hostile",
    ["a" * 300_000, "a1" * 100_000, r"\[" * 100_000, r"\(" * 100_000, r"\begin{a}" * 25_000, "`" * 199_999,
     "$" * 199_999, "\ud800" * 1000, "\x00", "字" * 300_000, "the " * 50_000, ". a" * 60_000],
    ids=lambda text: repr(text[:9]),
)  # fmt: skip
def test_hostile_thoughts_are_fast(hostile):
    begin = time.process_time()
    assert 0.0 <= share(hostile) <= 1.0
    assert time.process_time() - begin < 10


def test_an_unknown_language_is_named():
    assert len(LANGUAGES) > 60
    with pytest.raises(ValueError, match="language: got 'English', wanted one of af, "):
        language_reward(language="English")


def test_a_number_beside_chinese_takes_no_word_away():
    thought = "<think>先7+8=15再15-6=9，还剩9个</think>"
    assert language_reward(language="zh")([""], [thought], [[]]) == [1.0]
    assert language_reward(language="en")([""], [thought], [[]]) == [0.0]


def test_of_a_short_text_the_script_alone_may_decide():
    short = "Each gets 24 / 6 = 4 sweets."
    assert language_share(short, "en") == 0.0  # py3langid takes it for another language
    assert language_share(short, "en", sure_from=20) == 1.0 and language_share(short, "zh", sure_from=20) == 0.0
    assert language_share("7+8=15", "en") is None
