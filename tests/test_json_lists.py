"""A JSON file that is read a part at a time holds what json.loads finds in it, wherever the parts end."""

from __future__ import annotations

import json
import random
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from steadydetr.data.columns import IdColumn, id_array
from steadydetr.data.json_lists import NO_JSON, JsonLists, nulls_for_nan
from steadydetr.data.layouts import coco_file
from steadydetr.data.layouts.base import Finding
from steadydetr.data.layouts.coco import read_coco
from tests.data_folders import COCO

TEXTS = ("", "a", 'a"b', "\\", '\\"', "[{", "}],", ", {", "é\u2028", "NaN", "\\\\", "\n\t", '"}]')
SEPARATORS = ((",", ":"), (", ", ": "), (" ,\n", " :\t"))


def any_value(random: random.Random, depth: int = 3) -> Any:
    kind = random.randrange(7 if depth else 5)
    if kind == 5:
        return [any_value(random, depth - 1) for _ in range(random.randrange(4))]
    if kind == 6:
        return {random.choice(TEXTS): any_value(random, depth - 1) for _ in range(random.randrange(4))}
    return (random.choice(TEXTS), random.randrange(-9, 10**6), random.random(), None, True)[kind]


def any_file(random: random.Random) -> str:
    """Lists of all kinds and lengths among other values."""
    value = {name: any_value(random) for name in random.sample(TEXTS, random.randrange(4))}
    for name in random.sample(("images", "categories", "annotations", "[", 'a"'), random.randrange(4)):
        value[name] = [any_value(random) for _ in range(random.randrange(12))]
    names = random.sample(sorted(value), len(value))
    text = json.dumps({name: value[name] for name in names}, ensure_ascii=random.random() < 0.5, separators=random.choice(SEPARATORS))
    return random.choice(("", " ", "\n")) + text + random.choice(("", "\n "))


def read_parts(text: bytes, chunk: int, **options: Any) -> dict[str, Any]:
    """The lists of a file by the reader; raises what decoding raises."""
    lists = JsonLists.of(Path("f.json"), BytesIO(text), chunk)
    lists = JsonLists(lists.path, lists.file, lists.found, **options)
    around = msgspec.json.decode(lists.without_lists)
    found = {name: [entry for part in lists.read(name) for entry in msgspec.json.decode(part, type=list[Any])] for name in lists.names}
    for name in lists.names:
        lists.check(name)
        assert lists.most(name) == sum(isinstance(entry, (list, dict)) for entry in found[name])
        assert around[name] == []
    return around | found


@pytest.mark.parametrize("seed", range(2))
def test_parts_hold_what_the_file_does(seed: int) -> None:
    drawn = random.Random(seed)
    for _ in range(40):
        text = any_file(drawn)
        for chunk in (2, drawn.randrange(3, 40), 10**6):
            assert read_parts(text.encode(), chunk) == json.loads(text), (text, chunk)


@pytest.mark.parametrize("seed", range(2))
def test_what_is_no_json_is_refused(seed: int) -> None:
    """One sign less, more or another, or the end cut off: what json.loads refuses is refused, and else both read the same."""
    drawn, refused = random.Random(100 + seed), 0
    for _ in range(80):
        text = any_file(drawn)
        at = drawn.randrange(len(text))
        text = text[:at] + drawn.choice(("", "]", "}", "[", "{", ",", '"', "\\", "1")) + text[at + drawn.randrange(2) :]
        text = text if drawn.random() < 0.8 else text[:at]
        try:
            known = json.loads(text)
        except ValueError:
            known, refused = None, refused + 1
        for chunk in (2, drawn.randrange(3, 40), 10**6):
            if known is None:
                with pytest.raises(NO_JSON):
                    read_parts(text.encode(), chunk)
            elif isinstance(known, dict):
                assert read_parts(text.encode(), chunk) == known, (text, chunk)
    assert 20 < refused < 80


def test_of_lists_of_one_name_the_last_counts() -> None:
    assert read_parts(b'{"a": [1, {}], "b": 2, "a": [[3], [4]]}', 4) == {"a": [[3], [4]], "b": 2}
    assert read_parts(b'{"a": [1], "a": 2}', 4) == {"a": 2}


@pytest.mark.parametrize("entries", ["[{},]", "[,{}]", "[{} {}]", "[{}, ,{}]", "[{}}", "[{}", "[{}] []", '["'])
def test_commas_and_brackets_are_where_they_must_be(entries: str) -> None:
    for chunk in range(2, 20):
        with pytest.raises(NO_JSON):
            read_parts(f'{{"a": {entries}}}'.encode(), chunk)


def test_nan_is_null_outside_texts() -> None:
    text = r'{"NaN": [NaN, "-Infinity \" NaN", {"\\": -Infinity}, "\\", Infinity], "b": NaN}'
    assert json.loads(nulls_for_nan(text.encode())) == json.loads(text, parse_constant=lambda _: None)
    assert read_parts(text.encode(), 10**6, nulls=True) == json.loads(text, parse_constant=lambda _: None)
    with pytest.raises(NO_JSON):
        read_parts(text.encode(), 10**6)
    assert nulls_for_nan(b"no {} [number") == b"no {} [number"


@pytest.mark.parametrize("ids", [[], [1, 2, 2**31 - 1, -(2**31)], [1, 2**31], [5, -(2**31) - 1, 3], [1, "1", 2], [1, 2**63, 4], ["a", 7]])
def test_a_column_of_ids_is_the_array_of_all(ids: list[int | str]) -> None:
    for size in (1, 2, 9):
        column = IdColumn(len(ids) + 3)
        for start in range(0, len(ids), size):
            column.extend(ids[start : start + size])
        values, known = id_array(column.values), id_array(ids)
        assert values.dtype == known.dtype and values.tolist() == ids and {*map(type, values.tolist())} == {*map(type, ids)}
    assert IdColumn(2).values.dtype == np.int32


FIELDS: dict[str, list[Any]] = {
    "image_id": [1, 2, 2, 1.0, 77, "1", None],
    "category_id": [3, 9, 9, "3", 3.0, "nut", 4, 0],
    "bbox": [[1, 2, 3, 4], [0.5, 0.25, 3, 4], [1, 2, -3, 4], [1, 2, 3], [1, 2, 1e300, 4], [1, float("nan"), 3, 4]],
    "id": [1, 2, 2, None, "x", 7.0, [1]],
    "area": [12, None, -1, 0.5],
    "iscrowd": [0, 1, None, True, 0.0],
}


@pytest.mark.parametrize("seed", range(2))
def test_an_index_does_not_depend_on_where_the_parts_end(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do the faults that are found, whatever is wrong with entries."""
    drawn, path = random.Random(seed), tmp_path / "f.json"
    of = JsonLists.of
    for _ in range(20):
        usual = drawn.random() < 0.5  # only what every file has
        entries = [
            {name: drawn.choice(values[: 3 if usual else None]) for name, values in FIELDS.items()} for _ in range(drawn.randrange(9))
        ]
        content = {**COCO, "annotations": entries, "info": {"a": [{}]}, "other": [{}, 1]}
        names = drawn.sample(sorted(content), len(content))
        path.write_text(json.dumps({name: content[name] for name in names}))
        results = []
        for chunk in (10**6, 40, drawn.randrange(2, 300)):
            monkeypatch.setattr(coco_file.JsonLists, "of", lambda path, file, chunk=chunk: of(path, file, chunk))
            findings = list[Finding]()
            index = read_coco(path, [tmp_path], "x", report=findings.append).index
            results.append((index.identity, index.annotation_ids.tolist(), index.areas.tolist(), findings))
        assert results[0] == results[1] == results[2]
