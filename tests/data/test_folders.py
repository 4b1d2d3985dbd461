"""Which file of a folder is of which split, and what is said about the others."""

import pytest

from rankscope.data.folders import divide
from rankscope.errors import DataError


def splits(*files: str, readme: str = "", config: str | None = None) -> dict[str, list[str]]:
    return divide(files, readme, config, "folder").splits


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ("a.jsonl b.CSV c.parquet d.arrow e.tsv.gz f.json g.ndjson", {"train": 7}),
        ("train.jsonl test.jsonl dev.csv", {"train": 1, "test": 1, "validation": 1}),
        ("TRAIN.JSONL Valid.jsonl.gz", {"train": 1, "validation": 1}),
        ("val.jsonl eval/a.jsonl evaluation.csv", {"validation": 3}),
        ("data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet data/test-00000-of-00001.parquet",
         {"train": 2, "test": 1}),
        ("train-00000-of-00001-b42a775f407cee45.parquet", {"train": 1}),
        ("test_1.jsonl test-2.jsonl test.3.jsonl", {"test": 3}),
        ("test/a.jsonl training/part/b.jsonl c.jsonl", {"test": 1, "train": 2}),
        ("code_train.jsonl code_test.jsonl", {"train": 1, "test": 1}),  # twins
        ("rows-train-2024.csv rows-valid-2024.csv", {"train": 1, "validation": 1}),
        ("gsm_test.jsonl gsm_dev.jsonl more.jsonl", {"test": 1, "validation": 1, "train": 1}),
        ("part1.jsonl unit_test_questions.jsonl", {"train": 2}),  # diverted by its name by `datasets`
        ("contest.jsonl latest.csv testimony.csv name_test_x.jsonl evaluate.jsonl", {"train": 5}),
        ("train_a.jsonl test_b.jsonl", {"train": 2}),  # no twins
        ("latest.csv ladev.csv contest-a.json contrain-a.json", {"train": 4}),
    ],
)  # fmt: skip
def test_splits_are_named_by_files_and_folders(files: str, expected: dict[str, int]) -> None:
    found = splits(*files.split())
    assert {split: len(names) for split, names in found.items()} == expected
    assert sorted(name for names in found.values() for name in names) == sorted(files.split())
    assert all(names == sorted(names) for names in found.values())


def test_files_that_hold_no_rows() -> None:
    hidden = (".git/a.jsonl", ".x.jsonl", "__MACOSX/a.jsonl", "a/.cache/b.csv", "__pycache__/a.json")
    plain = ("README.md", "LICENSE", "license.txt", "load.py", "figure.png", "notice", "dataset_info.json")
    found = divide((*hidden, *plain, "a.jsonl", "rows.xlsx", "b/notes.txt", "more.zip"), "", None, "folder")
    assert found.splits == {"train": ["a.jsonl"]}
    assert found.notes == ["folder: no rows, not read: b/notes.txt, more.zip, rows.xlsx"]
    assert divide(("a.jsonl", *plain), "", None, "folder").notes == []


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ((), "folder: holds no data files\n  Give it some: .json"),
        (("rows.xlsx", "README.md"), "holds no data files, only rows.xlsx\n"),
        ((".rows.jsonl",), "holds no data files\n"),
        (("rows.py", "README.md"), "holds no data files; its loading script is not executed\n"),
    ],
)
def test_a_folder_without_data_says_what_it_holds(files: tuple[str, ...], problem: str) -> None:
    with pytest.raises(DataError) as caught:
        splits(*files)
    assert problem in str(caught.value)


FILES = ("a/x.jsonl", "a/y.jsonl", "b/x.jsonl", "train.csv", "b/deep/z.jsonl", ".hidden/x.jsonl")


@pytest.mark.parametrize(
    ("configs", "config", "expected"),
    [
        ("[{data_files: a/*.jsonl}]", None, {"train": ["a/x.jsonl", "a/y.jsonl"]}),
        ("[{config_name: one, data_files: train.csv}]", None, {"train": ["train.csv"]}),
        ("[{data_files: [a/x.jsonl, ./train.csv]}]", None, {"train": ["a/x.jsonl", "train.csv"]}),
        ("[{data_files: '**/*.jsonl'}]", None, {"train": ["a/x.jsonl", "a/y.jsonl", "b/deep/z.jsonl", "b/x.jsonl"]}),
        ("[{data_dir: b, data_files: '*.jsonl'}]", None, {"train": ["b/x.jsonl"]}),
        (
            "[{data_files: [{split: train, path: a/x.jsonl}, {split: code, path: [b/x.jsonl, a/y.jsonl]}]}]",
            None,
            {"train": ["a/x.jsonl"], "code": ["a/y.jsonl", "b/x.jsonl"]},
        ),
        ("[{data_files: {test: b/*, train: a/*}}]", None, {"test": ["b/x.jsonl"], "train": ["a/x.jsonl", "a/y.jsonl"]}),
        ("[{config_name: one, data_files: a/*}, {config_name: two, data_files: b/*}]", "two", {"train": ["b/x.jsonl"]}),
        *(
            (
                "[{config_name: one, data_files: a/*}, {config_name: two, data_files: b/*, default: true}]",
                config,
                {"train": ["b/x.jsonl"]},
            )
            for config in (None, "two")
        ),
        (
            "[{config_name: empty}]",
            None,
            {"train": ["a/x.jsonl", "a/y.jsonl", "b/deep/z.jsonl", "b/x.jsonl", "train.csv"]},
        ),
        ("7", None, {"train": ["a/x.jsonl", "a/y.jsonl", "b/deep/z.jsonl", "b/x.jsonl", "train.csv"]}),
    ],
)
def test_a_readme_names_files(configs: str, config: str | None, expected: dict[str, list[str]]) -> None:
    assert splits(*FILES, readme=f"---\nlicense: mit\nconfigs: {configs}\n---\n# Data", config=config) == expected


@pytest.mark.parametrize(
    "readme", ["", "# Data", "---\n: [\n---\n", "---\n- a\n---\n", "---\nconfigs: [1, {a: b}]\n---"]
)
def test_another_readme_changes_nothing(readme: str) -> None:
    assert splits("train.csv", "test.csv", readme=readme) == {"test": ["test.csv"], "train": ["train.csv"]}


@pytest.mark.parametrize(
    ("configs", "config", "problem"),
    [
        (
            "[{config_name: one, data_files: a/*}, {config_name: two, data_files: b/*}]",
            None,
            "configurations: one, two",
        ),
        ("[{config_name: one, data_files: a/*}]", "two", "no configuration 'two', only one"),
        ("[{data_files: {train: a/*, test: c/*}}]", None, "files of the split test that are not there"),
        ("[{data_files: ../elsewhere/*}]", None, "files of the split train that are not there"),
        ("[]", "two", r"no configuration 'two', only \(none\)"),
    ],
)
def test_a_readme_that_does_not_fit_the_folder(configs: str, config: str | None, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        splits(*FILES, readme=f"---\nconfigs: {configs}\n---\n", config=config)
