"""Labels: what is counted, what a model may answer, what survives an interruption, how reviewers agree."""

import json
import math
from types import SimpleNamespace

import polars as pl
import pytest

from microtome.errors import ShapeError
from microtome.interpret import (
    SPATIAL_CUES,
    ChatProvider,
    Evidence,
    Label,
    agreement,
    collect,
    cue_counts,
    cues_in,
    estimate,
    function_words,
    label_features,
    label_offline,
    ngram_lift,
    read_verdicts,
    windows,
    write_review_sheet,
)
from microtome.interpret.labels import EXAMPLE
from microtome.interpret.provider import ProviderError, checked
from microtome.report import feature_page, write_pages

GOOD = {"confidence": 0.9, "description": "left of", "common_patterns": ["left"], "cue_counts": {"left": 3}}


class Server:
    """Stands where the client of the openai package stands; answers what it is told to."""

    def __init__(self, *answers):
        self.answers, self.requests = list(answers), []
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))

    def create(self, **request):
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=answer))])


def evidence(n=3, text="is the cup left of the plate"):
    return [Evidence("vqa", str(i), 3, 2.0 - i / 10, text, windows(text.split(), 3)) for i in range(n)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Is the cat LEFT of the dog?", ["left"]),
        ("Is that right?", []),
        ("How many slices are left?", []),
        ("Which answer is the right answer?", []),
        ("What is on top of the table", ["on top of"]),
        ("leftover overcoat", []),
        ("Is it behind or above?", ["above", "behind"]),
    ],
)
def test_cues_are_whole_words_in_their_spatial_sense(text, found):
    assert cues_in(text) == found


def test_cue_counts_are_per_text():
    assert cue_counts(["left left", "left of", "above"]) == {"left": 2, "above": 1}


def test_ngram_lift_is_its_definition():
    table = ngram_lift(["a b", "a b", "a c"], ["a d"] * 10, min_count=2, n=(1, 2))
    row = table.filter(pl.col("ngram") == "a b").row(0, named=True)
    assert row["lift"] == pytest.approx((2.5 / 4) / (0.5 / 11))
    assert table["ngram"].to_list() == ["a b", "b", "a"]


def test_offline_label_names_what_stands_out():
    label = label_offline(2, 5, evidence(6), ["what colour is the cup"] * 30)
    assert "left" in " ".join(label.common_patterns)
    assert label.cue_counts == {"left": 6}
    assert label.confidence > 0.9
    assert label_offline(2, 5, evidence(6), [e.text for e in evidence(6)]).confidence == 0


def test_lower_bound_of_lift_is_its_definition():
    row = ngram_lift(["a b", "a b", "a c"], ["a d"] * 10, min_count=2, n=(2,)).row(0, named=True)
    se = math.sqrt(1 / 2.5 - 1 / 4 + 1 / 0.5 - 1 / 11)
    assert row["lift_low"] == pytest.approx(row["lift"] * math.exp(-1.96 * se))


def label_of(texts, background):
    return label_offline(0, 0, [Evidence("wiki", str(i), 0, 1.0, t) for i, t in enumerate(texts)], background)


def test_words_that_hold_sentences_together_label_nothing():
    texts = [f"it is a {word}" for word in ("river", "castle", "poem", "war")]
    assert label_of(texts, ["born in 1950"] * 50).confidence == 0
    named = label_of([f"{text} castle" for text in texts], ["born in 1950"] * 50)
    assert "castle" in named.common_patterns[0]
    assert not set(named.common_patterns) & {"is", "a", "it", "it is", "is a", "it is a"}


def test_spatial_words_are_no_function_words():
    assert not {word for word in function_words() if word in SPATIAL_CUES}
    assert label_of(["on it", "over it", "over him", "over her"], ["he sings"] * 50).common_patterns == [
        "over"
    ]


def test_a_word_of_two_samples_labels_nothing_and_neither_does_one_that_is_frequent_anyway():
    texts = ["red cup", "red hat", "old dog", "tall tree"]
    assert label_of(texts, ["x y"] * 100).confidence == 0
    common = ["blue sea"] * 35 + ["dark night"] * 65
    assert label_of(["blue cup", "blue hat", "blue tree", "old dog", "tall man"], common).confidence == 0
    assert label_of(["blue cup"] * 30 + ["old dog"] * 20, common).common_patterns[:1] != []


def test_the_surest_word_leads_not_the_rarest():
    texts = ["castle keep"] * 9 + ["castle moat"] * 3
    label = label_of(texts, ["castle wall"] * 2 + ["a river"] * 98)
    assert label.common_patterns[0] == "castle"


def test_language_model_labels_are_cached_and_resumed(tmp_path):
    cache, server = tmp_path / "labels.jsonl", Server(json.dumps(GOOD))
    provider = ChatProvider("m", client=server)
    seen = {1: evidence(), 2: evidence(text="is the fork above the spoon")}
    first = label_features(4, seen, provider, cache=cache, progress=False)
    assert [label.feature for label in first] == [1, 2]
    assert server.requests[0]["response_format"] == {"type": "json_object"}
    cache.write_text(cache.read_text() + '{"layer": 4, "feat')  # a line cut short by an interruption
    again = label_features(4, seen, provider, cache=cache, progress=False)
    assert again == first
    assert len(server.requests) == 2


def test_malformed_answers_are_asked_again(tmp_path):
    server = Server(
        "no json here", json.dumps({**GOOD, "confidence": 7}), "```json\n" + json.dumps(GOOD) + "\n```"
    )
    provider = ChatProvider("m", client=server, retries=2)
    [label] = label_features(0, {3: evidence()}, provider, cache=tmp_path / "c.jsonl", progress=False)
    assert label.description == "left of"
    assert len(server.requests) == 3


def test_a_malformed_answer_is_answered_with_what_was_wrong(tmp_path):
    server = Server("It is about cups.", json.dumps({**GOOD, "confidence": 2}), json.dumps(GOOD))
    provider = ChatProvider("m", client=server, retries=2)
    [label] = label_features(0, {3: evidence()}, provider, cache=tmp_path / "c.jsonl", progress=False)
    assert label.description == GOOD["description"]
    assert label.reason == ""
    first, second, third = (request["messages"] for request in server.requests)
    assert [m["role"] for m in first] == ["system", "user"]
    assert second[2] == {"role": "assistant", "content": "It is about cups."}
    assert "expected a JSON object, found 'It is about cups.'" in second[3]["content"]
    assert "confidence: expected a number from 0 to 1, found 2" in third[3]["content"]


def test_a_label_of_confidence_zero_is_a_label_and_not_asked_for_twice(tmp_path):
    unsure = json.dumps({"confidence": 0, "description": "nothing in common"})
    for calls in (1, 0):
        server = Server(unsure)
        provider = ChatProvider("m", client=server)
        [label] = label_features(0, {3: evidence()}, provider, cache=tmp_path / "c.jsonl", progress=False)
        assert label.description == "nothing in common"
        assert len(server.requests) == calls


def test_a_model_that_never_answers_is_said_so_and_asked_again_next_time(tmp_path):
    server = Server(ConnectionError("refused"))
    provider = ChatProvider("m", client=server, retries=1)
    [label] = label_features(0, {3: evidence()}, provider, cache=tmp_path / "c.jsonl", progress=False)
    assert label.confidence == 0
    assert label.description == "unlabelled"
    assert "ConnectionError: refused" in label.reason
    server.answers = [json.dumps(GOOD)]
    assert (
        label_features(0, {3: evidence()}, provider, cache=tmp_path / "c.jsonl", progress=False)[0].confidence
        == 0.9
    )


def test_servers_without_json_mode_are_asked_without():
    server = Server(ValueError("response_format is not supported"), json.dumps(GOOD))
    assert ChatProvider("m", client=server).complete("s", "u")["confidence"] == 0.9
    assert "response_format" not in server.requests[1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"confidence": "high"}, "confidence"),
        ({"confidence": True}, "confidence"),
        ({"description": ""}, "description"),
        ({"common_patterns": "left"}, "common_patterns"),
        ({"cue_counts": {"left": "many"}}, "cue_counts"),
    ],
)
def test_answers_are_checked_against_the_schema(change, named):
    with pytest.raises(ProviderError, match=named):
        checked(json.dumps({**GOOD, **change}))


def test_the_example_of_the_prompt_repeated_is_no_label():
    with pytest.raises(ProviderError, match="description: expected one of this feature, found the example's"):
        checked(EXAMPLE)


def test_answers_have_at_most_the_length_asked_for():
    server = Server(json.dumps(GOOD))
    ChatProvider("m", client=server, max_tokens=64).complete("s", "u")
    assert server.requests[0]["max_tokens"] == 64


def test_cost_is_known_beforehand():
    cost = estimate({1: evidence(), 2: evidence()})
    assert cost["requests"] == 2
    assert cost["price"] > 0


def test_evidence_joins_both_data_sets_and_marks_the_peak():
    top = pl.DataFrame(
        {"feature": [7, 7], "rank": [0, 1], "id": ["a", "b"], "position": [1, 0], "activation": [2.0, 1.0]}
    )
    found = collect(
        {"vqa": top, "vsr": top.head(1)},
        {"vqa": {"a": "left of", "b": "x"}, "vsr": {"a": "above it"}},
        tokens={"vqa": {"a": ["left", "of"], "b": ["x"]}},
        image_positions={"vqa": {"b": frozenset({0})}},
    )
    assert [e.dataset for e in found[7]] == ["vqa", "vqa", "vsr"]
    assert found[7][0].window == "left [of]"
    assert found[7][1].on_image
    assert not found[7][1].window


PIECES = [" is", " the", " c", "up", " up", "?", "\n", "caf", b"\xc3", b"\xa9", " bar"]


def decode(ids):
    """As a byte-level tokenizer decodes."""
    joined = b"".join(p if isinstance(p, bytes) else p.encode() for p in (PIECES[i] for i in ids))
    return joined.decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    ("position", "window"),
    [
        (0, "[is] the cup up?"),
        (2, "is the [c]up up?"),
        (3, "is the c[up] up?"),
        (4, "is the cup [up]?"),
        (5, "is the cup up[?]"),
    ],
)
def test_window_is_the_text_as_the_tokenizer_decodes_it(position, window):
    assert windows([0, 1, 2, 3, 4, 5], position, decode=decode) == window
    assert windows([0, 1, 2, 3, 4, 5], position, decode=decode, mark=False) == "is the cup up?"


@pytest.mark.parametrize("position", range(5))
def test_window_is_right_for_a_tokenizer_that_drops_the_first_space(position):
    def stripped(ids):
        return decode(ids).removeprefix(" ")

    ids = [0, 1, 2, 3, 4, 5]
    assert windows(ids, position, decode=stripped) == windows(ids, position, decode=decode)
    assert windows(ids, 4, radius=1, decode=stripped) == "up [up]?"


def test_a_token_that_is_part_of_a_character_has_the_whole_character_in_brackets():
    ids = [7, 8, 9, 10]
    assert [windows(ids, at, decode=decode) for at in range(4)] == [
        "[caf]é bar",
        "caf[é] bar",
        "caf[é] bar",
        "café [bar]",
    ]
    assert windows([0, 6, 1], 1, decode=decode) == "is [·] the"
    assert windows([7, 8], 1, decode=decode) == "caf[\ufffd]"


def test_token_ids_without_decode_are_refused():
    with pytest.raises(ShapeError, match="decode: expected a tokenizer's decode for token ids, found None"):
        windows([0, 1], 0)


def test_evidence_without_texts_is_the_words_around_the_peak():
    top = pl.DataFrame({"feature": [7], "rank": [0], "id": ["a"], "position": [3], "activation": [2.0]})
    tokens = {"wiki": {"a": [0, 1, 2, 3, 4, 5]}}
    [item] = collect({"wiki": top}, None, tokens=tokens, decode=decode, radius=2)[7]
    assert (item.text, item.window) == ("the cup up?", "the c[up] up?")
    with pytest.raises(
        ShapeError, match="texts, tokens: expected either for sample 'a' of wiki, found neither"
    ):
        collect({"wiki": top}, None)


def test_pages_are_written_for_review(tmp_path):
    label = Label(3, 9, "left <of>", 0.8, ["left"], {"left": 3})
    [path] = write_pages([label], {9: evidence()}, tmp_path, {9: {"variance_gap": 0.25}})
    page = path.read_text()
    assert path.name == "L3F9.html"
    assert "left &lt;of&gt;" in page
    assert "variance_gap" in page
    assert feature_page(label, evidence()).html()


def test_agreement_is_cohens_kappa(tmp_path):
    sheet = write_review_sheet([Label(0, i, "d", 0.5) for i in range(4)], tmp_path / "review.csv")
    table = pl.read_csv(sheet)
    a = table.with_columns(verdict=pl.Series(["right", "right", "wrong", "wrong"]))
    b = table.with_columns(verdict=pl.Series(["right", "wrong", "wrong", "wrong"]))
    figures = agreement(a, b)
    assert figures["agreement"] == 0.75
    assert figures["kappa"] == pytest.approx((0.75 - 0.5) / 0.5)


def test_unknown_verdicts_are_refused_with_their_line(tmp_path):
    sheet = write_review_sheet([Label(0, i, "d", 0.5) for i in range(2)], tmp_path / "review.csv")
    pl.read_csv(sheet).with_columns(verdict=pl.Series(["right", "perhaps"])).write_csv(sheet)
    with pytest.raises(ShapeError, match="'perhaps' in line 3"):
        read_verdicts(sheet)


def test_label_after_a_cut_line_is_kept(tmp_path):
    cache, server = tmp_path / "labels.jsonl", Server(json.dumps(GOOD))
    provider = ChatProvider("m", client=server)
    label_features(4, {1: evidence()}, provider, cache=cache, progress=False)
    cache.write_text(cache.read_text()[:-30])
    for _ in range(2):
        label_features(4, {1: evidence(), 2: evidence()}, provider, cache=cache, progress=False)
    assert [json.loads(line)["feature"] for line in cache.read_text().splitlines()[1:]] == [1, 2]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ('{"confidence": ' + "[" * 100_000 + "]" * 100_000 + "}", "answer: expected JSON, found"),
        (
            '{"confidence": 0.5, "description": "x", "cue_counts": {"a": ' + "9" * 5000 + "}}",
            "expected JSON, found",
        ),
        (
            '{"confidence": 0.5, "description": "\\ud800"}',
            "answer: expected text, found half of a surrogate pair",
        ),
    ],
)
def test_answer_that_no_table_can_hold_is_refused(answer, message):
    with pytest.raises(ProviderError, match=message):
        checked(answer)


def test_dollar_signs_in_prompts_are_drawn_as_they_are():
    pytest.importorskip("matplotlib")
    from microtome.report.circuits import attention_overlays
    from microtome.report.page import svg

    row = {"prompt": 0, "layer": 0, "head": 0, "text": "Which costs more, $a_$ or $b?", "weights": [0.1] * 4}
    figure = attention_overlays(pl.DataFrame([{**row, "image_mass": 0.5, "picture": None}]), "pay $5 or $6")
    assert "<svg" in svg(figure)
