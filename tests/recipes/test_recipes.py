"""The embedded model and data are what the recipes say: apart, well-formed, small, and really pretrained."""

import ast
import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import corpus
import instructions
import pretrain
from rankscope.demo import data_path, model_path
from rankscope.files import folder_bytes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "### Question: {instruction}\n{input}\n ### Answer: {output}"


@pytest.fixture(scope="module")
def library() -> corpus.Corpus:
    return corpus.read_corpus()


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in data_path().read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_path())


def stripped_lines(text: str) -> str:
    """Code without indentation and blank lines, between newlines, to be searched for in other code."""
    return "\n" + "\n".join(line.strip() for line in text.splitlines() if line.strip()) + "\n"


def made_from(library: corpus.Corpus, result: str) -> bool:
    """Whether a shipped file was made from this very library: another Python moves functions."""
    summary = json.loads((ROOT / "recipes" / "results" / result).read_text(encoding="utf-8"))
    return bool(summary["corpus_fingerprint"] == library.fingerprint)


# The split


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("fnmatch.py", "pretrain-heldout"),
        ("heapq.py", "instructions"),
        ("dataclasses.py", "pretrain"),
        ("test/test_heapq.py", "pretrain"),
        ("test/test_posix.py", "pretrain-heldout"),
    ],
)
def test_a_file_always_falls_into_the_same_part(path: str, part: str) -> None:
    assert corpus.assign_part(path) == part


def test_reading_twice_gives_the_same_corpus(library: corpus.Corpus) -> None:
    assert corpus.read_corpus() == library


def test_no_file_and_no_text_is_in_two_parts(library: corpus.Corpus) -> None:
    paths = [file.path for file in library.files]
    assert len(set(paths)) == len(paths)
    pretraining_texts = {file.text for file in library.part("pretrain")}
    copies = [file for file in library.part("instructions") if file.text in pretraining_texts]
    # The library's own `__phello__` says hello in two files alike. It has no documented function.
    assert all(file.path.startswith("__phello__/") for file in copies)


def test_parts_have_about_the_intended_sizes(library: corpus.Corpus) -> None:
    heldout = len(library.part("pretrain-heldout")) / len(library.files)
    assert 0.01 < heldout < 0.04
    code = [file for file in library.files if "test" not in file.path]
    instruction_files = library.part("instructions")
    assert 0.25 < len(instruction_files) / len(code) < 0.45
    assert not any(corpus.TEST_DIRECTORIES & set(Path(file.path).parts[:-1]) for file in instruction_files)


def test_a_library_is_read_in_order_without_installed_packages_and_other_encodings(tmp_path: Path) -> None:
    for name, content in {
        "b.py": b"b = 1\n",
        "a.py": b"a = 1\r\n",
        "latin.py": b"# caf\xe9\n",
        "empty.py": b"\n",
        "site-packages/installed.py": b"x = 1\n",
        "_sysconfigdata__linux_.py": b"prefix = '/somewhere'\n",
        "notes.txt": b"not code",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    read = corpus.read_corpus(tmp_path)
    assert [(file.path, file.text) for file in read.files] == [("a.py", "a = 1\n"), ("b.py", "b = 1\n")]
    (tmp_path / "b.py").write_bytes(b"b = 2\n")
    assert corpus.read_corpus(tmp_path).fingerprint != read.fingerprint


# The instruction data


def rows_of(source: str) -> list[instructions.Row]:
    return [
        instructions.make_row(node, class_name, source.split("\n"))
        for node, class_name in instructions.functions(instructions.parse(source))
    ]


def test_a_method_becomes_a_row_with_its_class_and_without_decorators() -> None:
    source = '''\
class Shape:
    @property
    @cached
    def area(
        self,
        scale=1,
    ):
        """The area.

        In square metres.
        """
        # reason
        if scale:
            return 1

        return 0
'''
    assert rows_of(source) == [
        instructions.Row(
            instruction="The area.\n\nIn square metres.",
            input="class Shape:\n    def area(\n        self,\n        scale=1,\n    ):",
            output="# reason\nif scale:\n    return 1\n\nreturn 0",
        )
    ]


def test_only_whole_paragraphs_are_asked() -> None:
    assert instructions.first_paragraphs("one\n\n" + "x" * 500) == "one"
    assert instructions.first_paragraphs("x" * 500) == ""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("", "trivial"),
        ("    pass\n", "trivial"),
        ("    ...\n", "trivial"),
        ("    raise NotImplementedError\n", "trivial"),
        ("    raise NotImplementedError('later')\n", "trivial"),
        ("    x = '''\nleft\n'''\n    return x\n", "dedented"),
    ],
)
def test_a_body_that_cannot_be_asked_for_is_dropped(body: str, reason: str) -> None:
    with pytest.raises(instructions.Dropped, match=reason):
        rows_of(f'def f():\n    """Doc."""\n{body}')


def test_rows_are_well_formed_and_short(rows: list[dict[str, str]], tokenizer: Any) -> None:
    assert len(rows) >= 60
    for row in rows:
        assert list(row) == ["instruction", "input", "output"]
        assert all(isinstance(value, str) and value.strip() == value.strip("\n ") != "" for value in row.values())
        assert len(row["instruction"]) <= instructions.MAX_INSTRUCTION_CHARACTERS
        ids = tokenizer(PROMPT.format(**row))["input_ids"]
        assert len([*ids, tokenizer.eos_token_id]) <= instructions.MAX_TOKENS
    assert len({(row["instruction"], row["input"]) for row in rows}) == len(rows)
    assert len({row["output"] for row in rows}) == len(rows)


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_signature_and_body_make_a_function(rows: list[dict[str, str]]) -> None:
    for row in rows:
        depth = 2 if row["input"].startswith("class ") else 1
        body = "\n".join("    " * depth + line for line in row["output"].split("\n"))
        (node,) = ast.parse(f"{row['input']}\n{body}\n").body
        if isinstance(node, ast.ClassDef):
            (node,) = node.body
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        assert not node.decorator_list


def test_no_row_comes_from_a_pretraining_file(library: corpus.Corpus, rows: list[dict[str, str]]) -> None:
    if not made_from(library, "instructions.json"):
        pytest.skip("the data was made from another Python's library")
    pretraining = "\0".join(stripped_lines(file.text) for file in library.part("pretrain"))
    known_lines = set(pretraining.replace("\0", "\n").split("\n"))
    sources = "\0".join(stripped_lines(file.text) for file in library.part("instructions"))
    for row in rows:
        body = stripped_lines(row["output"])
        assert body in sources
        # Looking the lines up first spares a search of 20 MB for most rows.
        assert not (known_lines.issuperset(body.split("\n")) and body in pretraining), row


# The model


def test_sizes_suit_a_package() -> None:
    assert folder_bytes(model_path()) <= 10_000_000
    assert data_path().stat().st_size <= 1_500_000
    assert sorted(path.name for path in model_path().iterdir()) == sorted(pretrain.SHIPPED_FILES)


def test_no_shipped_file_names_the_machine() -> None:
    files = [path for folder in (model_path().parent, ROOT / "recipes") for path in folder.rglob("*")]
    places = [str(ROOT), sys.base_prefix, sysconfig.get_paths()["stdlib"]]
    for path in files:
        if path.is_file() and path.suffix in {".json", ".jsonl", ".svg", ".md", ".py", ".PSF"}:
            text = path.read_text(encoding="utf-8")
            assert not [place for place in places if len(place) > 5 and place in text], path


def test_tokenizer_behaves_as_opt_s(tokenizer: Any) -> None:
    text = "def f(naïve):\n    return '→'\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.pad_token_id == 1
    assert tokenizer.convert_tokens_to_ids(["<s>", "<unk>"]) == [0, 3]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == pretrain.VOCAB_SIZE


def test_model_is_pretrained_and_loads_in_float32(library: corpus.Corpus, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    assert model.config.architectures == ["OPTForCausalLM"]
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.dtype == torch.float32

    heldout_nats, shuffled_nats = [], []
    for file in library.part("pretrain-heldout")[:16]:
        ids = torch.tensor([tokenizer(file.text[:1500])["input_ids"]])  # (1, tokens)
        order = torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            heldout_nats.append(model(input_ids=ids, labels=ids).loss.item())
            shuffled_nats.append(model(input_ids=ids[:, order], labels=ids[:, order]).loss.item())
    loss = sum(heldout_nats) / len(heldout_nats)
    print(f"held-out loss {loss:.2f} nats per token, tokens shuffled {sum(shuffled_nats) / len(shuffled_nats):.2f}")
    # A random model is at ln(8192) = 9.0, one that knows only how frequent tokens are at about 6.5.
    assert loss < 4.5
    assert sum(shuffled_nats) / len(shuffled_nats) > loss + 1.0  # it reads the order of the tokens


def test_summary_tells_of_the_shipped_model() -> None:
    results = ROOT / "recipes" / "results"
    summary = json.loads((results / "pretrain.json").read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (results / "pretrain.jsonl").read_text(encoding="utf-8").splitlines()]
    assert records[-1]["step"] == summary["steps_done"]
    assert records[-1]["heldout_nats_per_token"] == summary["heldout_nats_per_token"]
    assert records[-1]["tokens"] == summary["tokens_seen"]
