"""Tables of texts and of measured rows."""

from top_jax.tables import markdown, rows_as_text


def test_markdown_is_aligned():
    assert markdown(["name", "ms"], [["a", "1.5"], ["longer", "10"]]).splitlines() == [
        "| name   |  ms |",
        "| ------ | --: |",
        "| a      | 1.5 |",
        "| longer |  10 |",
    ]


def test_rows():
    rows = [
        {"name": "a", "ms": 1.23456, "range": [1.0, 12345.6], "ok": True, "rounds": 3},
        {"name": "longer", "ms": None, "ok": False},
        {"name": "c", "error": "no launch"},
        {"name": "d", "absent": "too large"},
    ]
    assert rows_as_text(rows).splitlines() == [
        "| name   |    ms |      range |  ok |",
        "| ------ | ----: | ---------: | --: |",
        "| a      | 1.235 | 1 .. 12346 | yes |",
        "| longer |     - |          - |  no |",
        "c: error: no launch",
        "d: absent: too large",
    ]
    assert rows_as_text([]) == "" and rows_as_text([{"absent": "not here"}]) == "absent: not here"
