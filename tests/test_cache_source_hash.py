"""Source hashes change with the code and with nothing else, and never run it."""

from __future__ import annotations

import itertools

import pytest

from titans_backends.cache.source_hash import join_hashes, source_hash

PYTHON = '''
"""Module."""
SIZE = 64
"""What it is."""

def kernel(x, *, rows: int = 2):
    """Docstring."""
    text = "kept"
    return [f"{x!r:>{rows}}", None, -0.5, b"x", text]  # comment
'''
CUDA = """
// comment
#define A 1
extern "C" __global__ void f(float *x) { /* block
comment */ x[0] = 1'000; char c = '"'; const char *s = "// kept"; }
"""


@pytest.fixture
def hash_of(tmp_path, monkeypatch):
    """Hashes a text as a module, or as a CUDA file, in a folder of its own: a path's hash is kept while its date and size stay."""
    folders = (tmp_path / f"folder_{number}" for number in itertools.count())

    def compute(text: str, suffix: str = ".py") -> str:
        folder = next(folders)
        folder.mkdir()
        (folder / f"kernel_under_hash{suffix}").write_text(text)
        monkeypatch.syspath_prepend(str(folder))
        return source_hash(["kernel_under_hash" if suffix == ".py" else str(folder / "kernel_under_hash.cu")])

    return compute


def test_python_hash_ignores_comments_docstrings_and_layout(hash_of):
    other = PYTHON.replace("# comment", "").replace("Docstring.", "Another.").replace('"""Module."""', "").replace("What it", "Why it")
    assert hash_of(PYTHON) == hash_of(other.replace("SIZE = 64", "SIZE   =   64\n\n"))


@pytest.mark.parametrize(
    ("old", "new"), [("64", "65"), ('"kept"', '"Kept"'), ("rows: int", "rows: float"), ("None", "False"), ("-0.5", "0.5"), ("!r", "!s")]
)
def test_python_hash_changes_with_the_code(hash_of, old, new):
    assert hash_of(PYTHON) != hash_of(PYTHON.replace(old, new))


def test_python_hash_is_the_same_on_every_python(hash_of):
    assert hash_of(PYTHON) == "af678676bb68"


@pytest.mark.parametrize(
    ("old", "new"), [("// comment", "// other"), ("block\ncomment", "x"), ("\n#define", "\n\n  #define"), ("float *x", "float   *x")]
)
def test_cuda_hash_ignores_comments_and_blanks(hash_of, old, new):
    assert hash_of(CUDA, ".cu") == hash_of(CUDA.replace(old, new), ".cu")


@pytest.mark.parametrize(("old", "new"), [("A 1", "A 2"), ("// kept", "// changed"), ("A 1\n", "A 1 "), ("1'000", "1'001")])
def test_cuda_hash_changes_with_the_code(hash_of, old, new):
    assert hash_of(CUDA, ".cu") != hash_of(CUDA.replace(old, new), ".cu")


def test_hash_covers_every_name_in_any_order_and_runs_none(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "explosive_one.py").write_text("raise SystemExit\n")
    (tmp_path / "explosive_two.py").write_text("x = 1\n")
    (tmp_path / "beside.cu").write_text("int x;")
    both = source_hash(["explosive_one", "explosive_two", "beside.cu"])
    assert len(both) == 12
    assert both == source_hash(["explosive_two", "beside.cu", "explosive_one"])
    assert both != source_hash(["explosive_one", "explosive_two"])
    (tmp_path / "beside.cu").write_text("int xy;")
    assert both != source_hash(["explosive_one", "explosive_two", "beside.cu"])
    assert join_hashes("a", "b") == "a+b"


def test_a_name_without_a_file_is_an_error():
    with pytest.raises(ModuleNotFoundError, match="no_such_module_here"):
        source_hash(["no_such_module_here"])
