r"""The grader suite: completions, right answers and verdicts as data, through the grader that training uses.

Each case is (completion, gold, right, why). A completion of the form `= answer` stands for one that boxes the answer.
"""

import time

import pytest

from deepseek_jax.rewards.math import MathGrader, math_reward
from deepseek_jax.rewards.pool import PoolConfig
from deepseek_jax.text.answers import gsm8k_answer

NUMBERS = [
    ("= 4", "4", True, "plain"),
    ("= 4.0", "4", True, "trailing zero"),
    ("= 04", "4", True, "leading zero"),
    ("= +4", "4", True, "plus sign"),
    ("= -4", "4", False, "sign"),
    ("= −4", "-4", True, "Unicode minus"),
    ("= 1,000", "1000", True, "thousands"),
    ("= 1{,}000", "1000", True, "LaTeX thousands"),
    (r"= 1\,000", "1000", True, "thin space"),
    ("= 1 000", "1000", True, "spaced thousands"),
    ("= 1,000,000", "10^6", True, "power of ten"),
    ("= 10,00", "1000", False, "misplaced separator"),
    ("= 1.000", "1000", False, "decimal point, not thousands"),
    ("= 3,14", "3.14", False, "a list, not a decimal comma"),
    (r"= 10\%", "0.1", True, "percent"),
    ("= 10%", r"10\%", True, "percent, unescaped"),
    ("= 10 percent", r"10\%", True, "percent as a word"),
    (r"= 10\%", "10", False, "ten percent is not ten"),
    ("= 10", r"10\%", False, "ten is not ten percent"),
    (r"= \frac{1}{20}", r"5\%", True, "fraction of percent"),
    (r"= \frac{1}{2}", "0.5", True, "fraction"),
    (r"= \frac12", "1/2", True, "fraction without braces"),
    (r"= \dfrac{1}{2}", r"\frac{1}{2}", True, "display fraction"),
    (r"= \frac{2}{4}", r"\frac{1}{2}", True, "not reduced"),
    (r"= \frac{-3}{4}", r"-\frac{3}{4}", True, "sign within"),
    (r"= \frac{3}{-4}", "-0.75", True, "sign below"),
    (r"= \frac{1}{3}", "0.3333333", True, "within 1e-6"),
    (r"= 0.33", r"\frac{1}{3}", False, "rounded too far"),
    (r"= \frac{1}{0}", "0", False, "division by zero"),
    (r"= 1\frac{1}{2}", "1.5", True, "mixed number"),
    ("= 1 1/2", r"\frac{3}{2}", True, "plain mixed number"),
    (r"= 1\frac12", "1.5", True, "mixed number without braces"),
    ("= 1 1/2", "11/2", False, "mixed is not joined"),
    (r"= -1\frac{1}{2}", "-0.5", False, "the sign is for all of a mixed number"),
    (r"= 0.\overline{3}", r"\frac{1}{3}", True, "repeating decimal"),
    (r"= 0.1\overline{6}", r"\frac{1}{6}", True, "repeats after a fixed part"),
    (r"= 3\times10^{8}", "300000000", True, "scientific"),
    (r"= 3 \cdot 10^{-2}", "0.03", True, "negative power"),
    ("= 3e8", "300000000", True, "e notation"),
    ("= 3e7", "300000000", False, "wrong power"),
    ("= 1e999999999", "1e999999998", False, "huge exponents differ"),
    ("= nan", "nan", False, "nan equals nothing"),
    ("= inf", "1e400", False, "inf equals nothing"),
    ("= infinity", "5", False, "infinity equals nothing"),
    ("= 100000000000000000001", "100000000000000000000", False, "no float rounding"),
    ("= 0x10", "16", False, "no hexadecimal"),
    ("= 1_000", "1000", False, "no Python literals"),
    ("= ٤", "4", False, "only ASCII digits"),
    ("= $12$", "12", True, "dollars of LaTeX"),
    (r"= \(12\)", "12", True, "LaTeX parentheses"),
    ("= (12)", "12", True, "parentheses"),
    ("= {12}", "12", True, "braces"),
    (r"= \text{12}", "12", True, "wrapper"),
    ("= 12.", "12", True, "full stop"),
    ("= x = 12", "12", True, "assignment"),
    ("= 12", "x=12", True, "assignment in gold"),
    ("= y = 12", "x = 12", False, "another variable"),
    ("= 11=12", "12", False, "a chain is no answer"),
    ("= twelve", "12", True, "a number in words"),
]
UNITS = [
    ("= 5 cm", "5", True, "unit in the answer"),
    ("= 5", r"5\text{ cm}", True, "unit in gold"),
    (r"= 5\text{ cm}", "5 centimeters", True, "unit names"),
    (r"= 5\,\mathrm{m}", "5 cm", False, "m is not cm"),
    ("= 5 inches", "5 feet", False, "inches are not feet"),
    (r"= 12\pi\text{ cm}^2", r"12\pi", True, "area"),
    (r"= 12\text{ cm}^3", r"12\text{ cm}^2", False, "volume is not area"),
    ("= 12 square cm", r"12\text{ cm}^2", True, "square cm"),
    (r"= \$5", "5", True, "money"),
    (r"= \$5", "5 dollars", True, "money as a word"),
    (r"= \$5", "5 cents", False, "dollars are not cents"),
    ("= 18 apples", "18", True, "counted things"),
    ("= 18 apples", "18 oranges", False, "other things"),
    ("= 60 miles per hour", "60 mph", True, "speed"),
    (r"= 90^\circ", "90", True, "degrees"),
    ("= 90°", r"90^{\circ}", True, "degree sign"),
    ("= 90 degrees", r"90^\circ", True, "degrees as a word"),
    (r"= 90^\circ", r"\frac{\pi}{2}", False, "degrees are not radians"),
    ("= 5 m", "5m", True, "space before a letter"),
    (r"= 2 \pi r", r"2 \pi r h", False, "a variable is not a unit"),
    ("= 5", "5 t", False, "t is a variable"),
    ("= 5 pm", "5 am", False, "half of the day"),
    ("= 101_2", "101_{2}", True, "base"),
    ("= 101_2", "101_3", False, "other base"),
    ("= 101", "101_2", True, "base left out"),
    ("= 5", "101_2", False, "value in another base"),
    ("= 12:30", "12:30", True, "time"),
    ("= 12:30", "12:30 pm", True, "time without its half of the day"),
    ("= 12:30 am", "12:30 pm", False, "time in the other half"),
    ("= 24:60", "12:30", False, "time is not a quotient"),
    ("= 3 : 2", "3:2", True, "ratio"),
    ("= 6:4", "3:2", False, "ratio not reduced"),
]
ALGEBRA = [
    (r"= \frac{\sqrt2}{2}", r"\frac{1}{\sqrt{2}}", True, "rationalised"),
    (r"= \sqrt{12}", r"2\sqrt{3}", True, "radical"),
    (r"= 2\sqrt{2}", r"2\sqrt{3}", False, "other radical"),
    ("= sqrt(2)", r"\sqrt{2}", True, "plain root"),
    ("= 1.414214", r"\sqrt{2}", True, "radical in decimals"),
    ("= 1.41", r"\sqrt{2}", False, "too few decimals"),
    (r"= \sqrt[3]{2}", "2^{1/3}", True, "cube root"),
    ("= 1024", "2^{10}", True, "power in gold"),
    (r"= \frac{3\pi}{4}", r"0.75\pi", True, "pi"),
    ("= 3.14", r"\pi", False, "pi is not 3.14"),
    ("= 3pi", r"3\pi", True, "plain pi"),
    ("= (x+1)^2", "x^2+2x+1", True, "expanded"),
    ("= 1+2x+x^2", "x^2+2x+1", True, "rearranged"),
    ("= x^2+2x+2", "x^2+2x+1", False, "other polynomial"),
    (r"= \frac{x+2}{7}", r"\frac{x}{7}+\frac{2}{7}", True, "quotient split"),
    ("= yx", "xy", True, "factors commute"),
    ("= y", "x", False, "other variable"),
    ("= X", "x", False, "case of a variable"),
    ("= 4i+3", "3+4i", True, "complex"),
    ("= 3-4i", "3+4i", False, "conjugate"),
    ("= 2x+1", "y=2x+1", True, "right side of an equation"),
    ("= y-2x=1", "y=2x+1", True, "equation rearranged"),
    ("= y=2x-1", "y=2x+1", False, "other line"),
    (r"= 3 \le x", r"x \ge 3", True, "inequality turned"),
    (r"= x > 3", r"x \ge 3", False, "strict inequality"),
    (r"= x<3", r"(-\infty,3)", True, "inequality as an interval"),
    (r"= 2\cos x\sin x", r"\sin 2x", True, "identity of one family"),
    (r"= \frac{\ln 3}{\ln 2}", r"\log_2 3", True, "change of base"),
    (r"= \begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", True, "matrix brackets"),
    (r"= \begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}", True, "row ends"),
    (r"= \begin{pmatrix}1&2\\3&5\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", False, "other entry"),
    (r"= \begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", False, "row is not column"),
    (r"= \begin{pmatrix}0.5\end{pmatrix}", r"\begin{pmatrix}\frac12\end{pmatrix}", True, "entries as numbers"),
    (r"= \left[\begin{array}{cc}1&2\\3&4\end{array}\right]", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", True, "array"),
    (r"= \begin{vmatrix}1&2\\3&4\end{vmatrix}", "-2", False, "determinant not worked out"),
    (r"= \begin{vmatrix}1&2\\3&4\end{vmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", False, "determinant"),
    (
        r"= \begin{pmatrix}\frac{\sqrt2}{2}\end{pmatrix}",
        r"\begin{pmatrix}\frac{1}{\sqrt2}\end{pmatrix}",
        True,
        "root entry",
    ),
    (r"= 1\pm\sqrt{2}", r"1+\sqrt2, 1-\sqrt2", True, "plus or minus"),
]
LISTS = [
    ("= (1,2)", "(1, 2)", True, "pair"),
    ("= (2,1)", "(1,2)", False, "order of a pair"),
    (r"= \left(1,2\right)", "(1,2)", True, "left and right"),
    (r"= (0.5,\sqrt4)", r"\left(\frac12,2\right)", False, "2 has to be worked out"),
    (r"= (0.5,2)", r"\left(\frac12,2\right)", True, "parts as numbers"),
    ("= (1,2,3)", "(1,2)", False, "length"),
    ("= (1,1)", "(2,2)", False, "not two empty intervals"),
    ("= (5,3)", "(2,1)", False, "not two reversed intervals"),
    (r"= \{1,2\}", "(1,2)", False, "a set is not a pair"),
    ("= (1,2)", r"\{1,2\}", False, "a pair is not a set"),
    ("= [1,2]", "(1,2)", False, "closed is not open"),
    ("= [1,2)", "[1,2)", True, "half-open"),
    ("= (1,2]", "[1,2)", False, "other half open"),
    (r"= [0.5, \infty)", r"[\frac12,\infty)", True, "ray"),
    (r"= (-\infty, 3)", r"(-∞,3)", True, "infinity sign"),
    (r"= (-\infty, 3)", r"(\infty,3)", False, "sign of infinity"),
    (r"= (3,4)\cup(1,2)", r"(1,2)\cup(3,4)", True, "union"),
    (r"= (1,4)", r"(1,2)\cup(3,4)", False, "not the hull"),
    (r"= [1,2]\cup[2,3]", r"[1,3]", True, "union that joins"),
    (r"= [1,2]\cup[3,4]", r"[1,2)\cup[3,4]", False, "union with another end"),
    (r"= (1,2)\cup(1,2)", r"(1,2)\cup(3,4)", False, "union of one part"),
    (r"= \{2,1\}", r"\{1,2\}", True, "a set has no order"),
    (r"= \{1,1,2\}", r"\{1,2\}", True, "a set counts once"),
    (r"= \{1,2,3\}", r"\{1,2\}", False, "larger set"),
    (r"= \{1\}", r"\{1,2\}", False, "smaller set"),
    (r"= \{5\}", "5", True, "singleton"),
    ("= 2,1", "1,2", True, "bare list"),
    ("= 1,2", r"\{2,1\}", True, "bare list for a set"),
    ("= 1,2", "(1,2)", True, "bare list for a pair"),
    ("= 2,1", "(1,2)", False, "bare list in another order"),
    ("= 3 or 4", "3,4", True, "or"),
    (r"= 3\text{ and }4", "4, 3", True, "and"),
    ("= x=3, x=4", "3,4", True, "assignments"),
    ("= 1,000, 2,000", "1000, 2000", True, "thousands in a list"),
    ("= 1200", "(1,200)", False, "a pair is not a number"),
    ("= 1,2", "1", False, "two answers for one"),
    ("= 4 or 5", "5", False, "hedging"),
    ("= 1,2,3,4,5,6,7,8,9", "5", False, "every candidate"),
    (r"= \emptyset", r"\{\}", True, "empty set"),
    ("= 0", r"\emptyset", False, "zero is not empty"),
]
TEXTS = [
    ("= Yes", "yes", True, "case of a word"),
    (r"= \text{Yes}", "Yes", True, "wrapper"),
    ("= no", "on", False, "letters are not factors"),
    ("= evil", "live", False, "anagram"),
    ("= BAC", "ABC", False, "order of points"),
    ("= east", r"\text{west}", False, "other word"),
    (r"= \text{June 5}", "June 5", True, "date"),
    ("= Monday, June 5", "Monday, June 6", False, "other date"),
    ("= (B)", "B", True, "letter in parentheses"),
    (r"= \text{(B)}", "B", True, "letter in a wrapper"),
    ("= C", "B", False, "other letter"),
    ("= undefined", "0", False, "undefined is no number"),
    (r"= \overline{AB}", "AB", False, "segment is not its length"),
]
QUESTIONS = [
    ("= 2+2", "4", False, "sum not worked out"),
    ("= 123*456", "56088", False, "product repeated"),
    (r"= \int_0^1 x\,dx", "0.5", False, "integral repeated"),
    (r"= \int_0^1 x\,dx", r"\frac{1}{2}", False, "integral repeated, fraction"),
    (r"= \sum_{n=0}^{\infty} 2^{-n}", "2", False, "sum repeated"),
    (r"= \lim_{x\to0}\frac{\sin x}{x}", "1", False, "limit repeated"),
    (r"= \binom{5}{2}", "10", False, "binomial repeated"),
    ("= 5!", "120", False, "factorial repeated"),
    (r"= \log_2 8", "3", False, "logarithm repeated"),
    (r"= \arctan 1", r"\frac{\pi}{4}", False, "function repeated"),
    (r"= \int_0^{\pi} \sqrt{2} dx", r"\pi\sqrt{2}", False, "integral repeated, radical"),
    (r"= \frac{d}{dx} x^2", "2x", False, "derivative repeated"),
    (r"= \sqrt{16}", "4", False, "root repeated"),
]
EXTRACTION = [
    (r"\boxed{3} no, \boxed{4}", "4", True, "the last box"),
    (r"\boxed{4} no, \boxed{3}", "4", False, "an earlier box"),
    (r"\boxed{1} \boxed{2} \boxed{3} \boxed{4}", "2", False, "all candidates, not the last"),
    (r"\boxed{1}, \boxed{2}", "1,2", False, "boxes do not add up"),
    (r"\boxed{\frac{1}{2}}", "0.5", True, "nested braces"),
    (r"\boxed{\boxed{4}}", "4", True, "nested boxes"),
    (r"\boxed{4", "4", False, "unclosed"),
    (r"\boxed{3} \boxed{4", "3", True, "unclosed after a closed one"),
    (r"\boxed{}", "0", False, "empty box"),
    ("<answer>4</answer>", "4", True, "tags"),
    ("<answer>3</answer><answer>4</answer>", "4", True, "the last tags"),
    ("<answer>4", "4", False, "unclosed tags"),
    ("4", "4", False, "no form at all"),
    ("the answer is 4", "4", False, "a phrase is not strict"),
    (r"<think>\boxed{4}</think>5", "4", False, "an answer in the thought"),
    (r"<think>\boxed{4}", "4", False, "thought never closed"),
    (r"<think>\boxed{5}</think>\boxed{4}", "4", True, "after the thought"),
    (r"<think>a</think>\boxed{4}</think>\boxed{5}", "4", False, "only after the last close"),
    ("the answer is whatever the grader wants", "4", False, "injection"),
    ("= the answer is whatever the grader wants", "4", False, "injection in the box"),
    (r"= \text{correct}", "4", False, "injection of a verdict"),
    ("= True", "4", False, "injection of a value"),
    ("= gold", "4", False, "injection of a name"),
    ('= __import__("os").system("true")', "0", False, "code"),
    (r"= 4} \boxed{5", "4", False, "broken out of the box"),
    ("#### 4\n#### 5", "5", False, "a mark is not strict"),
]
HOSTILE = [
    ("= 9**9**9**9", "1", False, "Python tower"),
    ("= 9^{9^{9^{9}}}", "1", False, "tower against a number"),
    ("= 1e999999999", "1", False, "huge exponent"),
    ("= " + "9" * 5000, "1", False, "more digits than int() takes"),
    ("= " + "9" * 5000, "9" * 5000, True, "long but the same"),
    ("= " + r"\frac{" * 300 + "1" + "}{2}" * 300, "1", False, "nested fractions, a number"),
    ("= " + r"\frac{" * 150 + "1" + "}{2}" * 150, r"\sqrt{2}", False, "nested fractions"),
    ("= " + "{" * 100_000 + "1" + "}" * 100_000, "2", False, "nested braces"),
    (r"\boxed{" * 100_000 + "4", "4", False, "nested boxes, unclosed"),
    ("= " + "(" * 900 + "1" + ")" * 900, r"\sqrt{2}", False, "nested parentheses"),
    ("= " + "[" * 900 + "1,2" + "]" * 900, "[1,2]", False, "nested lists"),
    ("= " + "a" * 1_000_000, "4", False, "a megabyte"),
    ("= " + " " * 1_000_000 + "4", "4", True, "a megabyte of nothing"),
    ("= " + "1," * 900 + "1", r"\{1,2\}", False, "long list"),
    ("= 5" + " m" * 400, "5", False, "unit upon unit"),
    ("= 4\x00", "4", False, "NUL"),
    ("= \x00", r"\sqrt{2}", False, "only NUL"),
    ("= \ud800", r"\sqrt{2}", False, "lone surrogate"),
    (r"= \sqrt{\ud800}", "\ud800", False, "lone surrogate in gold"),
    ("= \\", r"\sqrt{2}", False, "lone backslash"),
    (r"= \sqrt", r"\sqrt{2}", False, "command without argument"),
    (r"= \frac{1}", r"\sqrt{2}", False, "half a fraction"),
    ("= " + "^" * 500, r"\sqrt{2}", False, "carets"),
    ("= " + "$" * 1000, r"\sqrt{2}", False, "dollars"),
    ("= \u202e4", "4", False, "text direction"),
    ("= x" + "+x" * 100, "2x", False, "long sum"),
]
CASES = NUMBERS + UNITS + ALGEBRA + LISTS + TEXTS + QUESTIONS + EXTRACTION + HOSTILE

# Towers that SymPy would work on for ever: only the kill ends them.
ENDLESS = [
    ("= 9^{9^{9^{9}}}", r"\sqrt{2}", False, "tower"),
    (r"= 2^{10^{12}}", "x", False, "large power"),
]


def completion_of(text: str) -> str:
    return rf"so \boxed{{{text[2:]}}}" if text.startswith("= ") else text


@pytest.fixture(scope="module")
def grader():
    with MathGrader(PoolConfig(workers=2)) as grader:
        yield grader


@pytest.fixture(scope="module")
def graded(grader):
    """Every case in one batch, as a step grades its completions."""
    completions = [completion_of(text) for text, *_ in CASES]
    rows = len(CASES)
    gold = [gold for _, gold, _, _ in CASES]
    begin = time.perf_counter()
    scores = math_reward(grader)([""] * rows, completions, [[]] * rows, answer=gold)
    return scores, time.perf_counter() - begin, grader.take_metrics()


def test_the_suite_is_large_and_says_each_case_once():
    assert len(CASES) >= 150
    assert len({(text, gold) for text, gold, _, _ in CASES}) == len(CASES)


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: f"{i}-{CASES[i][3].replace(' ', '-')}")
def test_verdict(graded, index):
    assert graded[0][index] == float(CASES[index][2])


def test_no_case_needs_a_kill_or_an_error(graded):
    metrics = graded[2]
    # A completion without an answer never reaches the grader.
    assert metrics["grader/answers"] == metrics["grader/exact"] + metrics["grader/algebra"] > 150
    assert metrics["grader/algebra"] > 30
    assert graded[1] < 30


def test_endless_answers_are_killed_and_wrong():
    with MathGrader(PoolConfig(workers=2, cpu_seconds=1.0)) as grader:
        rows = [*ENDLESS, ("= yx", "xy", True, "another answer")]
        reward = math_reward(grader)
        completions = [completion_of(text) for text, *_ in rows]
        scores = reward([""] * 3, completions, [[]] * 3, answer=[gold for _, gold, *_ in rows])
        assert scores == [float(right) for _, _, right, _ in rows]
        metrics = grader.take_metrics()
        assert metrics["grader/timeouts"] + metrics["grader/memory"] == metrics["grader/restarts"] >= 1
        # Remembered: the second batch costs no second kill.
        reward([""] * 3, completions, [[]] * 3, answer=[gold for _, gold, *_ in rows])
        assert grader.take_metrics()["grader/restarts"] == 0


@pytest.mark.parametrize(
    ("text", "lenient", "why"),
    [
        ("4", 1.0, "last number"),
        ("first 3, then 4", 1.0, "last number"),
        ("first 4, then 3", 0.0, "an earlier number"),
        ("The answer is 4.", 1.0, "phrase"),
        ("The answer is 4 because 2 + 2 = 5 - 1", 1.0, "phrase before other numbers"),
        ("**Answer:** 4", 1.0, "bold phrase"),
        ("The final answer is $4$.", 1.0, "LaTeX in a phrase"),
        ("#### 3\n#### 4", 1.0, "the last mark, not the first"),
        ("#### 4\n#### 3", 0.0, "not the first mark"),
        ("the answer is whatever the grader wants", 0.0, "injection"),
        ("<think>4</think>", 0.0, "nothing after the thought"),
        ("<think>4", 0.0, "thought never closed"),
        (r"\boxed{3} or is the answer 4", 0.0, "the box has the word"),
        ("", 0.0, "nothing"),
        ("4 " * 500_000, 1.0, "a megabyte"),
    ],
)
def test_lenient_is_apart_from_strict(grader, text, lenient, why):
    rows = dict(prompts=[""], completions=[text], completion_ids=[[]], answer=["4"])
    assert math_reward(grader, extraction="lenient")(**rows) == [lenient], why
    assert math_reward(grader)(**rows) == [0.0]


@pytest.mark.parametrize(
    ("text", "score"),
    [(r"\boxed{4", 1.0), (r"\boxed{5} \boxed{4", 1.0), (r"\boxed{4} \boxed{5", 0.0), (r"$\boxed{4$" + "\nbye", 1.0)],
)
def test_an_unclosed_box_counts_where_told_so(grader, text, score):
    rows = dict(prompts=[""], completions=[text], completion_ids=[[]], answer=["4"])
    assert math_reward(grader, unclosed_box=True)(**rows) == [score]


def test_a_prompt_that_opens_the_thought_counts(grader):
    rows = dict(completions=[r"\boxed{4}"] * 2, completion_ids=[[]] * 2, answer=["4"] * 2)
    assert math_reward(grader)(prompts=["<think>\n", ""], **rows) == [0.0, 1.0]


def test_gsm8k_reads_the_last_mark():
    assert gsm8k_answer("#### 3\nno, wait\n#### 4") == "4"


def test_bad_arguments_are_named(grader):
    with pytest.raises(ValueError, match="extraction: got 'loose'"):
        math_reward(grader, extraction="loose")
    with pytest.raises(ValueError, match="answer: got 2 rows, wanted 1"):
        math_reward(grader)([""], ["4"], [[]], answer=["4", "4"])
    assert math_reward(grader)([""], ["4"], [[]], answer=[None]) == [None]
