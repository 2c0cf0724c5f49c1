"""The benchmarks' published scoring rules: an answer's text and its references give 0 to 1.

RULER (scripts/eval/synthetic/constants.py): case-insensitive substrings. InfiniteBench
(src/compute_scores.py): one rule per task. Written after their rules; each is tested on cases
worked out by hand.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from longreach.registry import Registry

Scorer = Callable[[str, Sequence[str]], float]
SCORERS: Registry[Scorer] = Registry("scorer")

_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢"
    "｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def score(scorer: str, answer: str, references: Sequence[str]) -> float:
    """Scores one answer, in [0, 1]."""
    return float(SCORERS[scorer](answer, references))


@SCORERS.register("string_match_all")
def string_match_all(answer: str, references: Sequence[str]) -> float:
    """RULER, all tasks but qa: the share of references that stand in the answer."""
    text = _printable(answer).lower()
    return sum(reference.lower() in text for reference in references) / len(references)


@SCORERS.register("string_match_part")
def string_match_part(answer: str, references: Sequence[str]) -> float:
    """RULER qa: whether any reference stands in the answer."""
    text = _printable(answer).lower()
    return float(any(reference.lower() in text for reference in references))


@SCORERS.register("first_integer")
def first_integer(answer: str, references: Sequence[str]) -> float:
    """InfiniteBench passkey and number_string: the first run of digits is the reference."""
    found = re.search(r"[0-9]+", answer)
    return float(found is not None and found.group() == references[0])


@SCORERS.register("word_match")
def word_match(answer: str, references: Sequence[str]) -> float:
    """InfiniteBench kv_retrieval: the reference is one of the answer's words."""
    return float(references[0] in _words(answer, "\n:\"'.,?!{}"))


@SCORERS.register("last_integer")
def last_integer(answer: str, references: Sequence[str]) -> float:
    """InfiniteBench code_run: the last word is the reference, as a number."""
    words = _words(answer, "\n.`'\":")
    return float(bool(words) and _integer(words[-1]) == int(references[0]))


@SCORERS.register("first_number")
def first_number(answer: str, references: Sequence[str]) -> float:
    """InfiniteBench math_find: the first number, whole or decimal, is the reference."""
    found = re.search(r"\d+\.\d+|\d+", answer)
    return float(found is not None and float(found.group()) == float(references[0]))


@SCORERS.register("running_values")
def running_values(answer: str, references: Sequence[str]) -> float:
    """InfiniteBench math_calc: the share of values right before the first that is wrong."""
    given = [int(digits) for digits in re.findall(r"[0-9]+", answer)]
    right = 0
    for value, reference in zip(given, references, strict=False):
        if value != int(reference):
            break
        right += 1
    return right / len(references)


@SCORERS.register("choice")
def choice(answer: str, references: Sequence[str]) -> float:
    """InfiniteBench En.MC: the letter at the start, after "answer is", or the first that stands
    alone."""
    if answer and answer[0] in "ABCD":
        return float(answer[0] in references)
    text = " ".join(_words(answer, "\n\"'.,?!{}"))
    for prefix in ("answer is:", "answer:", "answer is", "option is"):
        _, found, after = text.partition(prefix)
        if found:
            return float(any(after[1:].startswith(reference) for reference in references))
    letters = [word for word in text.split() if word in ("A", "B", "C", "D")]
    return float(bool(letters) and letters[0] in references)


@SCORERS.register("code_debug")
def code_debug(answer: str, references: Sequence[str]) -> float:
    """InfiniteBench Code.Debug: the letter with its dot, or letter or function after "is:"."""
    if answer[:2] in (f"{references[0]}.", f"{references[0]}:"):
        return 1.0
    text = answer.strip()
    for mark in ("\n", "`", "'", '"', "-", "*", "Option", "option"):
        text = text.replace(mark, " ")
    text = re.sub(" +", " ", text)
    for prefix in ("answer is:", "is:", "answer:"):
        _, found, after = text.partition(prefix)
        if found:
            return float(any(after[1:].startswith(reference) for reference in references))
    return 0.0


@SCORERS.register("dialogue_name")
def dialogue_name(answer: str, references: Sequence[str]) -> float:
    """InfiniteBench En.Dia: the name is one of the answer's words, in capitals."""
    return float(references[0] in _words(answer.upper(), "\n:\"'.,?!{}"))


@SCORERS.register("qa_f1")
def qa_f1(answer: str, references: Sequence[str]) -> float:
    """InfiniteBench En.QA: best F1 of words, without punctuation and articles."""
    return max(_f1(_normal_words(answer), _normal_words(reference)) for reference in references)


@SCORERS.register("qa_f1_zh")
def qa_f1_zh(answer: str, references: Sequence[str]) -> float:
    """InfiniteBench Zh.QA: best F1 of characters, without punctuation and spaces."""
    return max(_f1(_characters(answer), _characters(reference)) for reference in references)


@SCORERS.register("rouge_l_sum")
def rouge_l_sum(answer: str, references: Sequence[str]) -> float:
    """InfiniteBench En.Sum: best ROUGE-L-Sum F1; each line of a text is a sentence."""
    return max(_rouge_l_sum(answer, reference) for reference in references)


def _printable(text: str) -> str:
    return re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip()


def _words(text: str, separators: str) -> list[str]:
    return text.translate({ord(mark): " " for mark in separators}).split()


def _integer(word: str) -> int | None:
    try:
        return int(word)
    except ValueError:
        return None


def _normal_words(text: str) -> list[str]:
    bare = "".join(mark for mark in text.lower() if mark not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _characters(text: str) -> list[str]:
    dropped = set(string.punctuation + _CHINESE_PUNCTUATION)
    return [mark for mark in text.lower() if mark not in dropped and not mark.isspace()]


def _f1(given: Sequence[str], wanted: Sequence[str]) -> float:
    common = (Counter(given) & Counter(wanted)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _rouge_l_sum(answer: str, reference: str) -> float:
    """F1 of the union of longest common subsequences of each reference line with all lines."""
    given, wanted = _rouge_lines(answer), _rouge_lines(reference)
    given_left = Counter(word for line in given for word in line)
    wanted_left = Counter(word for line in wanted for word in line)
    totals = given_left.total(), wanted_left.total()
    if 0 in totals:
        return 0.0
    hits = 0
    for line in wanted:
        union = {at for other in given for at in _common_subsequence(line, other)}
        for at in sorted(union):
            word = line[at]
            if given_left[word] > 0 and wanted_left[word] > 0:
                hits += 1
                given_left[word] -= 1
                wanted_left[word] -= 1
    if hits == 0:
        return 0.0
    precision, recall = hits / totals[0], hits / totals[1]
    return 2 * precision * recall / (precision + recall)


def _rouge_lines(text: str) -> list[list[str]]:
    lines = [re.sub(r"[^a-z0-9]+", " ", line.lower()).split() for line in text.split("\n")]
    return [line for line in lines if line]


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> list[int]:
    """Places in `first` of one longest common subsequence with `second`."""
    lengths = [[0] * (len(second) + 1)]
    for word in first:
        row, above = [0], lengths[-1]
        for at, other in enumerate(second):
            row.append(above[at] + 1 if word == other else max(above[at + 1], row[at]))
        lengths.append(row)
    places, i, j = [], len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            places.append(i - 1)
            i, j = i - 1, j - 1
        elif lengths[i][j - 1] > lengths[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places[::-1]
