"""What counts as right, against answers made by hand; and that exercises are what they say."""

from __future__ import annotations

import itertools
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.evaluation import nearest, texts
from atlas_jax.evaluation.measures import Result, Setup, Value
from atlas_jax.evaluation.results import ResultsError, ResultsFile
from atlas_jax.evaluation.tasks import TASKS, associations, facts, generation, loss, names, reasoning, ruler
from atlas_jax.gguf import GGUFFile, Tokenizer

_FUNCTION_WORDS = re.compile(
    r"\b(a|after|an|and|as|at|been|before|by|for|from|had|has|he|her|here|his|in|is|of|on|the|to|was|when|who|with|will)\b"
)


@pytest.fixture(scope="module")
def setup(model: tuple[Path, Path], texts: Path) -> Setup:
    return make_setup(model, texts)


def make_setup(model: tuple[Path, Path], folder: Path, **how: object) -> Setup:
    with GGUFFile.open(model[0]) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    found = texts.load(folder, ("documents", "perplexity"), fetch=False)
    given = {"context": 8192, "scale": "quick", "seeds": 1} | how
    return Setup(tokenizer, found, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "digits"),
    [("12345", "12345"), (" 1 2-3.4,5!6", "12345"), ("it is 123", "123"), ("nothing", ""), ("0 and 12345", "01234")],
)
def test_a_code_is_the_first_five_digits_of_an_answer(answer: str, digits: str) -> None:
    assert facts.digits_of(answer) == digits


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), count=st.sampled_from([1, 5, 20]), distance=st.integers(64, 600))
def test_a_context_states_its_facts_once_and_a_distance_before_its_end(seed: int, count: int, distance: int) -> None:
    filler = " ".join(f"Sentence number {number} says nothing of interest." for number in range(300))
    case = facts.make_case(filler, seed, lambda text: len(text.split()), distance, count)
    assert case == facts.make_case(filler, seed, lambda text: len(text.split()), distance, count)
    assert len(dict(case.facts)) == count
    ends = []
    for place, code in case.facts:
        stated = facts.STATED.format(place=place, code=code)
        assert case.text.count(stated) == 1
        ends.append(case.text.index(stated) + len(stated))
    after = len(case.text[max(ends) :].split())
    assert distance <= after <= distance + 80


def test_names_are_whole_words_and_the_first_counts() -> None:
    assert names.first_of("It is Edith, not Bruno.", {"Bruno", "Edith"}) == "Edith"
    assert names.first_of("BRUNO and Edith", {"Bruno", "Edith"}) == "Bruno"
    assert names.first_of("Edithson", {"Bruno", "Edith"}) is None


def test_a_ruler_score_is_the_share_of_strings_that_are_there() -> None:
    assert ruler.score("They are 111 and 222.", ["111", "222", "333", "444"]) == 0.5
    assert ruler.score("abcde", ["ABCDE"]) == 1.0
    assert ruler.score("", ["1"]) == 0.0


@pytest.mark.parametrize("kind", ruler.KINDS)
@pytest.mark.parametrize("length", [4096, 8192])
def test_a_ruler_exercise_fills_its_length_and_holds_what_it_asks_for(setup: Setup, kind: str, length: int) -> None:
    given = ruler.exercise(setup, kind, length, seed=5)
    assert given == ruler.exercise(setup, kind, length, seed=5)
    assert given != ruler.exercise(setup, kind, length, seed=6)
    size = setup.count(f"{given.text}\n\n{given.question}{given.opening}") + given.answer
    assert 0.85 * length < size <= length
    assert all(wanted in given.text for wanted in given.wanted)
    assert ruler.score(given.opening, given.wanted) == 0


def test_common_and_frequent_words_are(setup: Setup) -> None:
    for kind, separators in (("common words", r"\d+\. "), ("frequent words", r"\s")):
        given = ruler.exercise(setup, kind, 8192, seed=1)
        body = given.text.partition("\n\n")[2]
        words = [word.strip() for word in re.split(separators, body) if word.strip() not in ("", "...")]
        counts = sorted(((words.count(word), word) for word in set(words)), reverse=True)
        most = counts[: len(given.wanted)]
        assert {word for _, word in most} == set(given.wanted)
        assert most[-1][0] > counts[len(most)][0], "the last of them is no more frequent than the next"


def test_variables_form_a_chain_of_one_value(setup: Setup) -> None:
    given = ruler.exercise(setup, "variable tracking", 4096, seed=2)
    values: dict[str, str] = {}
    for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", given.text):
        values[name] = values.get(value, value)  # in the order of the text, as a reader follows it
    assert set(values) == set(given.wanted)
    assert len(set(values.values())) == 1
    assert next(iter(values.values())) in given.question


def test_associations_share_no_word_with_their_questions() -> None:
    assert len(associations.LINKS) >= 40
    for said, asked in associations.LINKS:
        words = [set(re.findall(r"[a-z]+", _FUNCTION_WORDS.sub("", text.lower()))) for text in (said, asked)]
        assert not words[0] & words[1], (said, asked)
        assert words[1], asked


def test_the_right_choice_is_as_often_short_as_long_and_never_the_wrong_one() -> None:
    rng = random.Random(0)
    for make in reasoning._KINDS:
        choices = [make(rng) for _ in range(200)]
        assert all(one.right != one.wrong for one in choices)
        assert len({one.right for one in choices}) > 1


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 4))
def test_distinct_runs_against_a_count_by_hand(tokens: list[int], size: int) -> None:
    runs = [tuple(tokens[start : start + size]) for start in range(max(len(tokens) - size + 1, 0))]
    repeated = sum(run in runs[:index] for index, run in enumerate(runs))
    assert generation.distinct(tokens, size) == pytest.approx(1 - repeated / len(runs) if runs else 1.0)
    assert generation.copied(tokens, tokens, size) == (1.0 if runs else 0.0)
    assert generation.copied(tokens, [9, 9, 9, 9, 9], size) == 0.0


def test_the_gap_is_the_ratio_of_means_and_harm_the_worst_document() -> None:
    def result(arm: str, item: str, nats: float) -> Result:
        return Result(arm, item, 0, Value("past the window", nats, {"length": 4608}))

    results = [
        *(result("window", item, nats) for item, nats in (("a", 3.0), ("b", 2.0))),
        *(result("full", item, nats) for item, nats in (("a", 2.0), ("b", 1.9))),
        *(result("memory", item, nats) for item, nats in (("a", 2.4), ("b", 2.02))),
    ]
    losses = loss.by_document(results, 4608)
    assert loss.gap_closed(losses, "memory").value == pytest.approx((0.6 - 0.02) / (1.0 + 0.1))
    assert loss.gap_closed(losses, "window").value == 0
    assert loss.gap_closed(losses, "full").value == 1
    worst = loss.harm(losses, "memory")
    assert worst is not None
    assert worst == (pytest.approx(0.02), "b")


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 100), length=st.integers(3, 40), count=st.integers(1, 50), sharpness=st.floats(0, 30))
def test_neighbours_vote_as_in_a_loop_over_all_earlier_states(
    seed: int, length: int, count: int, sharpness: float
) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((length, 8)).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    tokens = rng.integers(0, 4, length)
    found = nearest.neighbours(keys, tokens, (count,), (sharpness,))[count, sharpness]
    assert found[0] == 0
    for at in range(1, length - 1):
        cosines = sorted(((float(keys[at] @ keys[earlier]), earlier) for earlier in range(at)), reverse=True)[:count]
        votes = [(math.exp(sharpness * cosine), tokens[earlier + 1]) for cosine, earlier in cosines]
        right = sum(vote for vote, token in votes if token == tokens[at + 1])
        assert found[at] == pytest.approx(right / sum(vote for vote, _ in votes), abs=1e-4)


def test_a_state_is_centred_by_what_came_before_it() -> None:
    states = np.random.default_rng(1).standard_normal((9, 4)) + 5
    whole = nearest.unit_states(states)
    assert np.allclose(whole[:5], nearest.unit_states(states[:5]), atol=1e-6)
    assert np.allclose(
        whole[4] @ (states[4] - states[:5].mean(axis=0)), np.linalg.norm(states[4] - states[:5].mean(axis=0))
    )


@pytest.mark.parametrize("scale", ["quick", "standard"])
def test_the_same_setup_gives_the_same_items(model: tuple[Path, Path], texts: Path, scale: str) -> None:
    tasks = TASKS if scale == "quick" else [task for task in TASKS if task.name in ("lists", "names", "reasoning")]
    first, second = (make_setup(model, texts, scale=scale, seeds=2) for _ in range(2))
    for task in tasks:
        items = task.items(first)
        assert items == task.items(second)
        assert items
        named = [(item.name, item.seed) for item in items]
        assert len(set(named)) == len(named), "two items of one name and seed"
        for one, other in itertools.combinations(items, 2):
            assert (one.name, one.seed) != (other.name, other.seed)


def test_a_line_that_is_no_result_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ResultsError, match="line 1"):
        ResultsFile(path)
