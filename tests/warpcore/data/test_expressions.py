import json
import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bounds import bounded
from warpcore.data.captions import BadCaption, CaptionGetter
from warpcore.data.expressions import ExpressionError, compile_expression
from warpcore.data.filters import Filter
from warpcore.errors import UserError


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ("identity", ("a",), "a"),
        ("lambda s: s > 4.5", (4.6,), True),
        ("lambda w, h: w*h >= 589824", (768, 768), True),
        ("lambda w, h: 0.5 < w / h <= 2 and not w % 2 == 1", (500, 400), True),
        ('lambda j: j["caption"]', ({"caption": "x"},), "x"),
        ('lambda j: j["a"]["b"][-1]', ({"a": {"b": [1, 2]}},), 2),
        ("lambda s: s.strip().lower().replace('_', ' ')[:5]", (" A_bcdefg ",), "a bcd"),
        ("lambda s: ', '.join(s.split('|')) if '|' in s else s", ("a|b",), "a, b"),
        ("lambda s: s in ('en', 'de') or s is None", ("de",), True),
        ("lambda s: max(len(s), 2) ** 2 - int('3') * -1", ("abc",), 12),
        ("lambda s: {'good': 1, 'bad': 0}[\"good\"]", ("x",), 1),
        ("lambda s: s // 2 + round(s / 3, 1)", (7,), 5.3),
        ("lambda s: sum([s, 1]) and any((s, 0))", (1,), True),
        ("lambda s: str(s) + str(round(s)) + str(None)", (1.5,), "1.52None"),
    ],
)
def test_an_expression_does_what_python_does(text, values, expected):
    expression = compile_expression(text)
    assert expression(*values) == expected
    assert pickle.loads(pickle.dumps(expression))(*values) == expected


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("lambda s: s.__class__", "s.__class__"),
        ("lambda s: s.lower().__class__.__bases__", "__bases__"),
        ("lambda s: s.lower", "s.lower"),
        ("lambda s: ().__class__.__subclasses__()", "__subclasses__"),
        ("lambda s: __import__('os')", "__import__"),
        ("lambda s: __builtins__", "__builtins__"),
        ("lambda s: open('x')", "open"),
        ("lambda s: eval('1')", "eval"),
        ("lambda s: getattr(s, 'x')", "getattr"),
        ("lambda s: '{0.__class__}'.format(s)", "format"),
        ("lambda s: '{}'.format_map(s)", "format_map"),
        ("lambda s: f'{s}'", "f-string"),
        ("lambda s: [x for x in s]", "comprehension"),
        ("lambda s: (lambda: 1)()", "lambda: 1"),
        ("lambda s: (t := s)", "t := s"),
        ("lambda s: 9 ** 9 ** 9", "9 ** 9 ** 9"),
        ("lambda s: 'a' * 10 ** 9", "'a' * 10 ** 9"),
        ("lambda s: '%1000000000d' % 1", "%1000000000d"),
        ("lambda s: s << 99", "s << 99"),
        ("lambda s: s[s]", "s[s]"),
        ("lambda s: s(1)", "'s'"),
        ("lambda s: max(*s)", "*s"),
        ("lambda s: str(s, encoding='x')", "encoding"),
        ("lambda s: b'1'", "bytes"),
        ("lambda s: len", "'len'"),
        ("lambda s: [[0] * 9999] * 9999", "list of lists"),
        ("lambda s: [1][5] * 2", "IndexError"),
        ("lambda s: {'a': 1}['b'] * 2", "KeyError"),
        ("lambda s: (1).lower() * 2", "AttributeError"),
        ("lambda s: other > 1", "other"),
        ("lambda s=1: s", "defaults"),
        ("lambda *s: s", "plain arguments"),
        ("lambda s, s: s", "duplicate argument"),
        ("lambda: 1", "no argument"),
        ("lambda len: 1", "len"),
        ("print(1)", "starts with 'lambda'"),
        ("lambda s: s\nimport os", "column"),
        ("lambda s: \0", "null bytes"),
        ("lambda s: " + "(" * 300 + "s" + ")" * 300, "column"),
        ("lambda s: " + "not " * 150 + "s", "levels deep"),
        ("lambda s: " + "-" * 900 + "s", ""),
        ("lambda s: (" + "s," * 400 + ")", "pieces"),
        ("lambda s: " + "s+" * 600 + "s", "characters"),
        ("import os", "column"),
        ("", "column"),
        (4.5, "4.5"),
    ],
)
def test_anything_else_is_refused_by_name(text, piece):
    with pytest.raises(ExpressionError) as refused:
        compile_expression(text)
    assert piece in str(refused.value)


def test_the_place_of_a_refused_piece_is_named():
    with pytest.raises(ExpressionError, match="column 19: 'open'"):
        compile_expression("lambda s: s > 1 + open(s)")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("lambda n: 'a' * n", 10**9),
        ("lambda n: n * [0]", 10**9),
        ("lambda n: n ** n", 10**6),
        ("lambda s: '%d' % s if s else s % 1", "%1000000000d"),
        ("lambda s: s.replace('', s).replace('', s).replace('', s)", "a" * 1000),
        ("lambda s: s.join(s).join(s).join(s)", "a" * 1000),
        ("lambda s: round(s, -10**9)", 5),
        ("lambda s: round(5, s)", 10**9),
        ("lambda s: str([s, s])", [0] * 1000),
        ("lambda s: sum([s, s], s)", [0] * 1000),
        ("lambda s: [s * 1000] * 1000", [0]),
        ("lambda s: s * (s,)", 10**9),
        ("lambda s: s in [s * 100 + 'b'] * 100", "a" * 1000),
    ],
)
def test_what_could_fill_the_memory_is_stopped_while_it_runs(text, value):
    with pytest.raises((ValueError, TypeError), match="allowed"):
        compile_expression(text)(value)


def test_the_costliest_expression_takes_no_second_for_a_row(tmp_path):
    looking = "1"
    for _ in range(8):
        looking = f"(({looking}) in [s * 90 + 'b'] * 99 + [s * 90 + 'c'] * 99)"
    function = compile_expression(f"lambda s: {looking}")
    with bounded(tmp_path, seconds=1):
        assert function("a") is False


_OPERATORS = ["+", "-", "*", "/", "//", "%", "<", ">=", "==", "!=", " and ", " or "]
_SHAPES = [f"({{}}{operator}{{}})" for operator in _OPERATORS] + [
    "({} if {} else {})",
    "({} < {} <= {})",
    "({} in [{}, 3])",
    "max({}, {})",
    "min({}, {}, 1)",
    "(not {})",
    "(-{})",
    "abs({})",
]


@st.composite
def _bodies(draw, depth=3):
    shape = draw(st.sampled_from(_SHAPES)) if depth and draw(st.booleans()) else None
    if shape is None:
        return draw(st.sampled_from(["a", "b", "0", "1", "2.5", "7", "True"]))
    return shape.format(*(draw(_bodies(depth=depth - 1)) for _ in range(shape.count("{}"))))


_TEXTS = _bodies().map(lambda body: f"lambda a, b: {body}")


def _outcome(function, *values):
    try:
        return repr(function(*values))
    except ArithmeticError as error:
        return type(error).__name__


@settings(max_examples=300, deadline=None)
@given(_TEXTS, st.integers(-(10**20), 10**20), st.floats(allow_nan=False))
def test_random_expressions_agree_with_python(text, a, b):
    assert _outcome(compile_expression(text), a, b) == _outcome(eval(text), a, b)


_NUMBERS = st.one_of(st.none(), st.integers(-100, 100), st.floats(-10, 10))


@settings(max_examples=100, deadline=None)
@given(_TEXTS, st.lists(st.tuples(_NUMBERS, _NUMBERS), min_size=1, max_size=20))
def test_a_filter_over_columns_agrees_with_python_row_by_row(text, rows):
    columns = {
        f"json.{name}": pa.array([None if row[place] is None else float(row[place]) for row in rows], pa.float64())
        for place, name in enumerate("ab")
    }
    table = pa.table({"key": [str(n) for n in range(len(rows))], **columns})
    plain = eval(text)
    complete = [None not in row for row in rows]
    outcomes = [
        _outcome(lambda *v: bool(plain(*v)), *map(float, row))
        for row, whole in zip(rows, complete, strict=True)
        if whole
    ]
    if any("Error" in outcome for outcome in outcomes):
        with pytest.raises(UserError, match="fails on sample"):
            Filter.parse([["a", "b"], text]).evaluate(table)
        return
    verdict = Filter.parse([["a", "b"], text]).evaluate(table)
    assert [str(passed) for passed, whole in zip(verdict.passed, complete, strict=True) if whole] == outcomes
    assert not verdict.passed[~np.array(complete)].any()
    assert verdict.missing.sum() == complete.count(False)


def test_the_mapping_form_sees_the_rows_fields():
    table = pa.table(
        {"key": ["0", "1", "2"], "width": [5, 6, 7], "json.s": [1.0, None, 9.0], "json.t": ["a", "b", "c"]}
    )
    verdict = Filter.parse(["json", 'lambda j: j["s"] > 5 and j["t"] == "c"']).evaluate(table)
    assert verdict.passed.tolist() == [False, False, True]
    assert verdict.missing.sum() == 1
    assert Filter.parse(["json", 'lambda j: "s" not in j']).evaluate(table).passed.tolist() == [False, True, False]


def test_a_filter_that_fails_names_the_sample_and_its_value():
    table = pa.table({"key": ["good", "odd"], "json.s": ["1", "unknown"]})
    with pytest.raises(UserError, match=r"sample 'odd' {'s': 'unknown'}: ValueError"):
        Filter.parse(["s", "lambda s: float(s) > 0"]).evaluate(table)


def test_a_filter_on_a_key_that_no_sample_has_lists_what_there_is():
    condition = Filter.parse(["aestetic_score", "lambda s: s > 4.5"])
    with pytest.raises(
        UserError, match=r"no sample has 'aestetic_score'. Did you mean 'aesthetic_score'\?.*caption"
    ) as error:
        condition.check_keys({"aesthetic_score", "caption"})
    assert "Remove the filter (dataset_filters=[] on the command line" in str(error.value)
    with pytest.raises(UserError, match="lists or mappings"):
        Filter.parse(["json", 'lambda j: j["tags"] == 1']).check_keys({"score"}, {"tags"})


def test_looking_for_a_key_that_is_not_in_the_index_is_refused():
    condition = Filter.parse(["json", "lambda j: 'tags' not in j"])
    with pytest.raises(UserError, match="'tags' holds lists or mappings"):
        condition.check_keys({"score", "tags"}, {"tags"})
    condition.check_keys({"score"}, {"other"})
    Filter.parse(["text", "lambda s: 'tags' in s"]).check_keys({"text"}, {"tags"})


def test_a_filter_of_the_wrong_shape_is_explained():
    with pytest.raises(UserError, match="takes 2 values, but 1 columns"):
        Filter.parse(["width", "lambda w, h: w > h"])
    with pytest.raises(UserError, match=r"expected \[column, expression\]"):
        Filter.parse("lambda w: w")


def test_captions_come_from_text_and_json():
    assert CaptionGetter.parse(["txt", "identity"])({"txt": "\ufeffein Bär\n".encode()}) == "ein Bär"
    getter = pickle.loads(pickle.dumps(CaptionGetter.parse(["json", 'lambda j: j["caption"]'])))
    assert getter({"json": json.dumps({"caption": "a bear"}).encode()}) == "a bear"
    assert getter.setting == ["json", 'lambda j: j["caption"]']


def test_captions_come_from_several_members_and_columns():
    entry = [[".TXT", "json", "json.style", "width"], 'lambda t, j, s, w: t + j["end"] + s * (w >= 640)']
    getter = pickle.loads(pickle.dumps(CaptionGetter.parse(entry)))
    assert (getter.members, getter.columns) == (("txt", "json"), ("style", "width"))
    assert getter.keys_of("json") == ["end"]
    contents = {"txt": b"a bear", "json": b'{"end": ", "}'}
    assert getter(contents, {"style": "oil", "width": 640}) == "a bear, oil"
    assert getter(contents, {"style": "oil", "width": 639}) == "a bear,"
    with pytest.raises(BadCaption, match=r"the sample has no \.txt"):
        getter({"json": b"{}"}, {"style": "oil", "width": 1})
    with pytest.raises(BadCaption, match=r"the \.json has no key 'end'; it has: other"):
        getter(contents | {"json": b'{"other": 1}'}, {"style": "oil", "width": 1})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([["txt", "json"], "lambda t: t"], "takes 1 values, not 2"),
        (["txt", "lambda t, j: t"], "takes 2 values, not 1"),
        (["t5_xxl.pickle", "identity"], r"\.t5_xxl\.pickle is a pickle.*never read.*--features texts"),
        ([[], "identity"], r"expected \[member, expression\].*found \[\[\]"),
        ([["txt", 3], "lambda t, n: t"], r"found \[\['txt', 3\]"),
        ([["txt", "json"], "lambda t, j: j.__class__"], "attributes can't be read"),
    ],
)
def test_a_caption_entry_of_the_wrong_shape_is_explained(entry, message):
    with pytest.raises(UserError, match=message):
        CaptionGetter.parse(entry)


NESTED = {"json": json.dumps({"meta": {"title": 1, "tags": ["x"]}, "text": "t"}).encode()}


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ('lambda j: j["meta"]["caption"]', r"the \.json has no key 'caption' in \['meta'\]; it has: title, tags$"),
        ('lambda j: j["meta"]["caption"]["en"]', r"no key 'caption' in \['meta'\]; it has: title, tags$"),
        ('lambda j: j["text"]["en"]', r"no key 'en' in \['text'\]: that is no mapping but 't'$"),
        (
            'lambda j: j["meta"]["tags"][0]["en"]',
            r"no key 'en' in \['meta'\]\['tags'\]\[0\]: that is no mapping but 'x'$",
        ),
        ('lambda j: j["no"] if "no" in j else j["meta"]["b"]', r"no key 'b' in \['meta'\]; it has: title, tags$"),
        ('lambda j: j["meta"]["tags"][5]', "IndexError"),
        ('lambda j: {"a": 1}["b"] + j["text"]', "KeyError: 'b'"),
    ],
)
def test_an_absent_key_inside_of_another_is_named_with_those_beside_it(expression, reason):
    with pytest.raises(BadCaption, match=reason):
        CaptionGetter.parse(["json", expression])(NESTED)


@pytest.mark.parametrize(
    ("entry", "content", "reason"),
    [
        (["txt", "identity"], b"\xff\xfe", "not UTF-8"),
        (["json", 'lambda j: j["caption"]'], b"{", "not JSON"),
        (["json", 'lambda j: j["caption"]'], b'{"title": 1}', "no key 'caption'; it has: title"),
        (["json", 'lambda j: j["caption"]'], b'{"caption": 5}', "not text but int"),
        (["json", 'lambda j: j["caption"].lower()'], b'{"caption": 5}', "AttributeError"),
    ],
)
def test_an_unusable_caption_says_why(entry, content, reason):
    with pytest.raises(BadCaption, match=reason):
        CaptionGetter.parse(entry)({entry[0]: content})
