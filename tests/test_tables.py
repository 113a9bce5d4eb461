"""Tables of numbers: what is read, what is refused, and the way back to their units."""

import importlib.util
import sys

import numpy as np
import pytest
import torch

from fastscore import cli, datasets
from fastscore.cli import held_out, run_folder, splits
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit
from fastscore.datasets import tables

TINY = {"width": 8, "depth": 1, "levels": 3, "batch_size": 8, "steps": 3, "seed": 3}
ROWS = np.random.default_rng(0).standard_normal((20, 3)) * [0.1, 5, 100] + [7, -2, 1e6]


def written(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def table(path, rows=ROWS, header="a,b,c", words=None):
    lines = [",".join(map(repr, row)) for row in rows.tolist()]
    if words is not None:
        lines = [f"{line},{word}" for line, word in zip(lines, words)]
    return written(path, "\n".join([header, *lines]) + "\n")


def test_columns_are_standardised_and_come_back(tmp_path):
    source = datasets.open(table(tmp_path / "x.csv"))
    x = source.read(torch.arange(20))
    assert x.dtype == torch.float32 and source.shape == (3,) and source.labels is None
    # float32 of numbers of about one.
    torch.testing.assert_close(x.mean(0), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(3), rtol=1e-6, atol=0)
    expected = (ROWS - ROWS.mean(0)) / ROWS.std(0)
    torch.testing.assert_close(x, torch.from_numpy(expected).float(), rtol=0, atol=1e-6)
    back = source.units.to_units(x)
    assert back.dtype == torch.float64
    # Half a unit of float32 in the last place of |x| < 4, in units of each column's deviation.
    assert ((back - torch.from_numpy(ROWS)).abs() < 2.4e-7 * source.units.deviation).all()


def test_small_differences_on_large_numbers_are_kept(tmp_path):
    """Times in nanoseconds of a day: float32 holds none of their differences."""
    rows = 1.7e18 + np.arange(0, 86_400e9, 3_600e9)[:, None] * [1, 2]
    x = datasets.open(table(tmp_path / "x.csv", rows, "a,b")).read(torch.arange(24))
    assert len(x[:, 0].unique()) == 24


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1,2\n3,4.5\n",
        "a,b\r\n1,2\r\n3,4.5\r\n",
        "\ufeffa,b\n1,2\n3,4.5",
        "\na,b\n1,2\n\n3,4.5\n\n",
        '"a","b"\n"1"," 2 "\n3,4.5e0\n',
        "a,b,id\n1,2,x\n3,4.5,y\n",
    ],
    ids=["plain", "CRLF", "mark", "blank lines", "quotes", "without"],
)
def test_the_ways_to_write_a_table_are_one(tmp_path, text):
    written(tmp_path / "x.csv", text)
    name = f"{tmp_path}/x.csv" + (":without=id" if "id" in text else "")
    source = datasets.open(name)
    assert source.units.columns == ("a", "b")
    assert source.raw(torch.arange(2)).tolist() == [[1, 2], [3, 4.5]]


def test_columns_without_names_have_numbers(tmp_path):
    written(tmp_path / "x.csv", "1,2,0\n3,4.5,1\n5,6,0\n")
    source = datasets.open(f"{tmp_path}/x.csv:label=3")
    assert source.units.columns == ("1", "2") and source.labels.tolist() == [0, 1, 0]
    # An index that pandas wrote.
    written(tmp_path / "y.csv", ",a\n0,1\n1,5\n")
    assert datasets.open(f"{tmp_path}/y.csv:without=1").units.columns == ("a",)


REFUSED = {
    "text": ("a,b\n1,2\n3,x\n", r"x\.csv, line 3, column b: it must be a finite number; got 'x'"),
    "missing": ("a,b\n1,2\n,4\n", r"line 3, column a: a value is missing"),
    "not a number": ("a,b\n1,nan\n", r"line 2, column b: .* got 'nan'"),
    "infinite": ("a,b\n1,2\n1,inf\n", r"line 3, column b: .* got 'inf'"),
    "too large": ("a,b\n1,2\n1,1e999\n", r"line 3, column b: .* got '1e999'"),
    "underscores": ("a,b\n1,2\n1,1_000\n", r"line 3, column b: .* got '1_000'"),
    "short row": ("a,b\n1,2\n3\n", r"line 3: it must have 2 columns; got 1"),
    "long row": ("a,b\n1,2\n\n3,4,5\n", r"line 4: it must have 2 columns; got 3"),
    "names": ("a,b,a\n1,2,3\n", r"the names of columns must differ; 'a' comes twice"),
    "semicolons": ("a;b\n1,5;2\n", r"line 2: it must have 1 columns; got 2; columns are separated"),
    "constant": ("a,b,c\n1,2,3\n1,5,3\n", r"a, c are the same in .*:without=a:without=c"),
    "empty": ("", r"x\.csv is empty"),
    "header alone": ("a,b\n", r"x\.csv holds no rows"),
    "Latin-1": ("é,b\n1,2\n".encode("latin-1"), r"is not a readable \.csv file \(it is not UTF-8"),
    "zeros": (b"a,b\n1,\0\n", r"line 2, column b|is not a readable \.csv file"),
    "a long name": ("a," + "b" * 300 + "\n1,2\n", r"must have at most 200 characters; got 'bbb"),
    "open quote": ('a,b\n1,"2\n3,4\n', r"line 3, column b|line 3: it must have 2"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_table_is_one_sentence_with_its_place(tmp_path, kind):
    text, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message) as error:
        datasets.open(written(tmp_path / "x.csv", text))
    assert "\n" not in str(error.value)


def test_labels_are_a_column_by_name(tmp_path):
    words = [["setosa", "virginica", "versicolor"][i % 3] for i in range(20)]
    path = table(tmp_path / "x.csv", header="a,b,c,species", words=words)
    source = datasets.open(f"{path}:label=species")
    assert source.classes == ("setosa", "versicolor", "virginica") and source.shape == (3,)
    assert source.labels.tolist() == [[0, 2, 1][i % 3] for i in range(20)]

    path = table(tmp_path / "y.csv", header="a,b,c,k", words=[i % 4 for i in range(20)])
    source = datasets.open(f"{path}:label=k")
    assert source.classes is None and source.labels.tolist() == [i % 4 for i in range(20)]

    path = table(tmp_path / "z.csv", header="a,b,c,k", words=[f"n{i}" for i in range(20)])
    with pytest.raises(ValueError, match="k must be classes; each of its 20 rows has one of its"):
        datasets.open(f"{path}:label=k")
    with pytest.raises(ValueError, match=r"has no column 'kind'; its columns are \['a', 'b'"):
        datasets.open(f"{path}:label=kind")
    with pytest.raises(ValueError, match="says two things about one"):
        datasets.open(f"{path}:label=k:label=a")


# Parquet


def parquet(path, **columns):
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table(columns), path)
    return path


def test_parquet_is_read_as_the_same_numbers(tmp_path):
    words = ["ab"[i % 2] for i in range(20)]
    columns = dict(zip("abc", ROWS.T))
    path = parquet(tmp_path / "x.parquet", **columns, i=np.arange(20), kind=words)
    of_text = datasets.open(table(tmp_path / "x.csv"))
    source = datasets.open(f"{path}:label=kind:without=i")
    every = torch.arange(20)
    assert torch.equal(source.read(every), of_text.read(every))
    assert source.units.columns == of_text.units.columns
    assert source.classes == ("a", "b") and source.labels.tolist() == [i % 2 for i in range(20)]


def test_what_is_wrong_in_parquet_is_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    for columns, message in (
        ({"a": [1.0, None]}, "row 2, column a: a value is missing"),
        ({"a": [1.0, 2.0, float("nan")]}, "row 3, column a: it must be a finite number; got nan"),
        ({"a": [1, 2], "b": ["x", "y"]}, "column b: it must hold numbers; got string .:without=b"),
        ({"a": [1.0, 1.0]}, "a is the same in every row"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            datasets.open(parquet(path, **columns))
        assert "\n" not in str(error.value)
    whole = parquet(path, a=np.arange(99.0)).read_bytes()
    for data in (b"", b"PAR1", whole[:50], whole[:-9], whole.replace(b"PAR1", b"PAR2")):
        with pytest.raises(ValueError, match=r"is not a readable \.parquet file"):
            datasets.open(written(path, data))

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find(name)
    )
    with pytest.raises(ValueError, match=r"takes pyarrow, which is not installed"):
        datasets.open(parquet(path, a=[1.0, 2.0]))


# Runs


def test_a_run_is_in_units_of_its_training_rows_and_keeps_them(tmp_path):
    path = table(tmp_path / "x.csv")
    config = TrainConfig(**TINY, data=str(path), out=tmp_path / "run", held_out=6)
    list(fit(config))
    training, _ = datasets.split(20, 6)
    kept = splits.units(tmp_path / "run")
    assert kept.columns == ("a", "b", "c")
    torch.testing.assert_close(kept.mean, torch.from_numpy(ROWS[training].mean(0)))
    torch.testing.assert_close(kept.deviation, torch.from_numpy(ROWS[training].std(0)))
    x, _ = splits.part(config, "training")
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(3), rtol=1e-6, atol=0)
    back = kept.to_units(splits.part(config, "held_out")[0])
    apart = torch.from_numpy(ROWS)[datasets.split(20, 6)[1]]
    assert ((back - apart).abs() < 1e-6 * kept.deviation).all()

    # Rows that come later change nothing.
    table(path, np.concatenate([ROWS[:3] + 5, ROWS]))
    with pytest.warns(UserWarning, match="has 3 images that the run"):
        again, _ = splits.part(run_folder.read_config(tmp_path / "run")[0], "training")
    assert torch.equal(again, x)
    table(path, ROWS, header="a,b,d")
    with pytest.raises(ValueError, match=r"must have the columns \['a', 'b', 'c'\]; got .*'d'\]"):
        splits.source(config)


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["fastscore", *map(str, words)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


def test_samples_are_written_in_the_units_of_the_table(tmp_path, monkeypatch, capsys):
    path = table(tmp_path / "x.csv", header="a,b,c,k", words=[i % 2 for i in range(20)])
    out = tmp_path / "run"
    options = ["--steps", 3, "--width", 8, "--levels", 3, "--batch-size", 8, "--held-out", 5]
    options += ["--sigma-max", 1, "--sigma-min", 0.01]
    assert not run(monkeypatch, "train", "--data", f"{path}:label=k", "--out", out, *options)
    shown = (out / "samples.csv").read_text().splitlines()
    assert shown[0] == "a,b,c" and len(shown) == 65 and not (out / "samples.png").exists()

    assert not run(monkeypatch, "sample", out, "-n", 7, "--out", tmp_path / "s.csv")
    assert not run(monkeypatch, "sample", out, "-n", 7, "--out", tmp_path / "s.npz")
    of_text = np.loadtxt(tmp_path / "s.csv", delimiter=",", skiprows=1)
    with np.load(tmp_path / "s.npz") as archive:
        assert archive["columns"].tolist() == ["a", "b", "c"]
        np.testing.assert_allclose(archive["table"], of_text, rtol=1e-6)
    # Untrained columns stand where the table's do.
    units = splits.units(out)
    assert (np.abs(of_text - units.mean.numpy()) < 20 * units.deviation.numpy()).all()

    for words, message in (
        (["sample", out], "the run is of a table, whose samples are no pictures; name a .csv"),
        (["sample", out, "--out", "s.csv", "--path", "p.png"], "are no pictures"),
        (["evaluate", out], "is of a table"),
        (["evaluate", out, "--likelihood", "--grey-levels", 4], "grey_levels belongs to images"),
        (["train", "--data", path, "--network", "ncsn", "--out", tmp_path / "n"], "for images"),
        (["train", "--data", path, "--shift", 1, "--out", tmp_path / "n"], "must be images"),
    ):
        assert run(monkeypatch, *words) == 2
        assert message in capsys.readouterr().err


def test_a_density_is_in_the_units_of_the_table(tmp_path):
    """Columns ten times as large have a tenth of the density; standardised they are the same."""
    found = []
    for k, factor in enumerate((1.0, 10.0)):
        path = table(tmp_path / f"{k}.csv", ROWS * factor)
        out = tmp_path / f"run{k}"
        list(fit(TrainConfig(**TINY, data=str(path), out=out, held_out=6)))
        found.append(held_out.report(out, 6)["nats_per_dim"]["held_out"]["mean"])
    # Rounding of the standardised columns to float32.
    assert found[0] - found[1] == pytest.approx(np.log(10), abs=1e-4)


def test_a_classifier_of_rows_can_be_trained(tmp_path):
    path = table(tmp_path / "x.csv", header="a,b,c,k", words=["xy"[i % 2] for i in range(20)])
    config = TrainConfig(**TINY, data=f"{path}:label=k", out=tmp_path / "run", task="classifier")
    list(fit(config))
    assert run_folder.open_run(tmp_path / "run", "classifier").shape == (3,)


def test_words_behind_the_name():
    assert tables.parse("a:b.csv:without=x y:label=k:without=z") == (
        tables.Path("a:b.csv"), "k", ("x y", "z"),
    )  # fmt: skip
