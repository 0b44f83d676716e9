import pytest

from lavis.core.errors import TrainingError
from lavis.core.registries import METRICS
from lavis.eval.answers import Answer, normalize, read_answers, write_answers
from lavis.eval.metrics import judged


def answer(expected, given, kind="colour", lang="en"):
    return Answer("1", kind, lang, ("a.png",), "What?", expected, given)


def test_answers_are_compared_without_case_spaces_and_final_punctuation():
    assert answer("red", " Red. ").correct and answer("红色", "红色。").correct and answer("two", "two").correct
    assert not answer("red", "red circle").correct and not answer("red", "").correct and not answer("one", "0").correct
    assert normalize("Ｒｅｄ！") == "red"


def test_accuracy_by_kind_and_language():
    answers = [answer("red", "red"), answer("red", "blue"), answer("two", "two", "count", "zh")]
    assert METRICS.get("accuracy")().score(answers) == {
        "accuracy": 2 / 3,
        "accuracy/kind=colour": 0.5,
        "accuracy/kind=count": 1.0,
        "accuracy/lang=en": 0.5,
        "accuracy/lang=zh": 1.0,
    }


def test_answers_survive_the_disk(tmp_path):
    answers = [answer("红色", "红色", lang="zh"), answer("red", "blue")]
    write_answers(tmp_path / "a.jsonl", answers)
    assert read_answers(tmp_path / "a.jsonl") == answers


@pytest.mark.parametrize(("value", "said"), [("x", "ValueError"), (None, "TypeError"), (1 / 3, "")])
def test_a_metric_that_fails_or_gives_no_number_is_named(value, said):
    class Own:
        name = "own"

        def score(self, answers):
            return {"own": value}

    if not said:
        assert judged(Own(), []) == {"own": 1 / 3}
        return
    with pytest.raises(TrainingError, match=f"the metric 'own' fails: {said}.*The answers are written"):
        judged(Own(), [])
