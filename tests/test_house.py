"""The project's own rules: short functions and lines, who counts bytes, who names instructions, who imports whom, a
true tree.

Each rule is a function from text to what is wrong with it, and is shown a text that breaks it.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src" / "qembag"
pytestmark = pytest.mark.skipif(not SOURCES.is_dir(), reason="the sources are not beside the tests")


def sources(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in SOURCES.glob(pattern))


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(SOURCES).as_posix() for path in paths]


# ---- Short functions -------------------------------------------------------------------------------------------------

MAX_LINES = 60


def python_functions(text: str) -> Iterator[tuple[str, int]]:
    """Each function's name and lines of code, without docstring and blank lines."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            used = set(range(node.lineno, node.end_lineno + 1))
            if ast.get_docstring(node) is not None:
                used -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
            yield node.name, sum(1 for number in used if lines[number - 1].strip())


def without_docstrings(text: str) -> str:
    return re.sub(r'(?ms)^[ \t]*""".*?"""', "", text)


def cython_functions(text: str) -> Iterator[tuple[str, int]]:
    """Blocks that `def`, `cdef` or `cpdef` begin, but for classes, structs, enums and declarations of C."""
    lines = without_docstrings(text).splitlines()
    for number, line in enumerate(lines):
        start = re.match(r"( *)c?p?def (?!class|struct|enum|extern)[^(=]*?(\w+)\(", line)
        if start is None:
            continue
        end, header = number, code_of(line)
        while header.count("(") > header.count(")"):
            end += 1
            header += code_of(lines[end])
        if not header.endswith(":"):
            continue  # a variable
        end += 1
        while end < len(lines) and (not lines[end].strip() or lines[end].startswith(start[1] + " ")):
            end += 1
        yield start[2], sum(1 for used in lines[number:end] if used.strip())


def code_of(line: str) -> str:
    """A line of Cython without its comment."""
    return line.partition("#")[0].rstrip()


def c_functions(text: str) -> Iterator[tuple[str, int]]:
    """What stands between braces at the outermost level, after a list of parameters."""
    text = re.sub(r"(?s)/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), text)
    text = re.sub(r"(?m)//.*$|^[ \t]*#(?:.*\\\n)*.*$", lambda gone: "\n" * gone[0].count("\n"), text)
    text = re.sub(r'"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)\'', "0", text)
    depth = begin = 0
    for place in re.finditer(r"[{};]", text):
        depth += {"{": 1, "}": -1, ";": 0}[place[0]]
        if place[0] == "{" and depth == 1:
            header = text[begin : place.start()]
        elif depth == 0:
            name = re.search(r"(\w+)\s*\(", header) if place[0] == "}" else None
            if name is not None:
                yield name[1], sum(1 for line in text[begin : place.end()].splitlines() if line.strip())
            begin = place.end()
    assert depth == 0, "braces do not match"


FUNCTIONS = {".py": python_functions, ".pyx": cython_functions, ".pxi": cython_functions, ".h": c_functions}


def too_long(text: str, suffix: str) -> list[str]:
    return [f"{name}: {lines} lines" for name, lines in FUNCTIONS[suffix](text) if lines > MAX_LINES]


CODE = sources("**/*.py", "*.pyx", "*.pxi", "*.h")


@pytest.mark.parametrize("path", CODE, ids=names(CODE))
def test_no_function_is_long(path):
    assert too_long(path.read_text(), path.suffix) == []


LONG = {
    ".py": 'def f(a):\n    """Says\n    much."""\nBODY',
    ".pyx": 'cdef inline int f(int a,\n                  int b) noexcept nogil:\n    """Says\n    much."""\nBODY',
    ".h": "/* a } */\nstruct s { int a; };\n#define G(a) { \\\n    a\nstatic inline int f(int a)\n{\nBODY}\n",
}


@pytest.mark.parametrize(("suffix", "own"), [(".py", 1), (".pyx", 2), (".h", 3)])
def test_a_long_function_is_found(suffix, own):
    statement = "    g('}', \"}\");\n\n" if suffix == ".h" else "    g()\n\n"
    assert too_long(LONG[suffix].replace("BODY", statement * (MAX_LINES - own)), suffix) == []
    assert too_long(LONG[suffix].replace("BODY", statement * (MAX_LINES - own + 1)), suffix) == ["f: 61 lines"]


def test_functions_are_told_from_what_looks_like_them():
    text = """
    cdef extern from "a.h" nogil:
        int g(int)
    cdef class A:
        cdef int b
        def __cinit__(self, int b):
            self.b = g(b)

        @property
        def c(self):
            cdef int d = g(self.b)
            return d
    cdef struct S:
        int (*f)(int) noexcept nogil
    cdef int e = f(1)
    """
    assert list(cython_functions(textwrap.dedent(text))) == [("__cinit__", 2), ("c", 3)]


def test_functions_are_found_in_each_file_that_has_some():
    for path in sources("*.pyx", "*.pxi", "lanes_*.h"):
        assert list(FUNCTIONS[path.suffix](path.read_text())), path.name


# ---- Short lines -----------------------------------------------------------------------------------------------------

WIDEST = 120
TEXTS = [*CODE, *sources("*.pxd", "*.pyi")]


def too_wide(text: str) -> list[int]:
    """Numbers of lines. ruff lets comments and docstrings pass, and does not read C."""
    return [number for number, line in enumerate(text.splitlines(), 1) if len(line) > WIDEST]


@pytest.mark.parametrize("path", TEXTS, ids=names(TEXTS))
def test_no_line_is_wide(path):
    assert too_wide(path.read_text()) == []


def test_a_wide_line_is_found():
    assert too_wide(f"# {'a' * 118}\n# {'a' * 119}\n") == [2]


# ---- Who counts bytes ------------------------------------------------------------------------------------------------

COUNTS = {"bits", "row_bytes", "codes_start", "codes_bytes", "pairs_start", "pairs_bytes", "pair_size"}


def counts_bytes(text: str) -> list[str]:
    """Arithmetic, other than powers, with a layout's numbers, or with a dim and 2, 4 or 8."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.BinOp, ast.AugAssign)) and not isinstance(node.op, ast.Pow):
            sides = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.target, node.value)
            used = {getattr(side, "attr", getattr(side, "id", None)) for side in sides}
            numbers = {side.value for side in sides if isinstance(side, ast.Constant)}
            if used & COUNTS or ("dim" in used and numbers & {2, 4, 8}):
                found.append(ast.unparse(node))
    return found


PYTHON = [path for path in sources("**/*.py") if path.name != "layout.py"]


@pytest.mark.parametrize("path", PYTHON, ids=names(PYTHON))
def test_only_the_layout_counts_bytes(path):
    assert counts_bytes(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "dims = (row_bytes - 8) * 2",
        "tail = table.row_bytes - 4",
        "per_byte = 8 // bits",
        "size = -(-dim * bits // 8)",
        "size = table.dim + 8",
        "size = dim // 2",
        "size += row_bytes",
        "message = f'a multiple of {8 // bits}'",
        "rows[:, layout.pairs_start : layout.pairs_start + 2 * layout.pair_size]",
    ],
)
def test_counting_bytes_is_found(line):
    assert counts_bytes(line)
    assert counts_bytes("top = 2**bits - 1; n = dim + 1; size = layout.row_bytes * 1") == ["layout.row_bytes * 1"]


def test_the_rule_finds_what_the_layout_does():
    assert len(counts_bytes((SOURCES / "layout.py").read_text())) >= 5


# ---- Who names instructions, OpenMP and errors ---------------------------------------------------------------------

INTRINSICS = re.compile(r"\b_mm\d*_\w+|\bv(?:ld1|st1)\w*|\b\w*mmintrin\b|\barm_neon\b|\b__m(?:128|256|512)\w*")
ALLOWED = {"cpu.h": ["immintrin"]}  # for _xgetbv of Microsoft's compiler
OPENMP = re.compile(r"\bomp\.h\b|\bomp_(?:get|set)_\w+|\bcimport +openmp\b")
# Text between quotes that the loops may have: the capsule's name, and the one error.
KERNEL_TEXTS = {"qembag loops", "qembag: no memory to watch for forks"}
KERNELS = [
    "_kernels.pyx",
    "lookup_blocks.pxi",
    "lookup_bags.pxi",
    "lookup_gathered.pxi",
    "lookup_passes.pxi",
    "lookup_threads.pxi",
    "quantize_fit.pxi",
    "quantize_loops.pxi",
]
COMPILED = sources("**/*.py", "*.pyx", "*.pxi", "*.pxd", "*.h")


@pytest.mark.parametrize("path", COMPILED, ids=names(COMPILED))
def test_only_lanes_name_instructions_and_only_parallel_openmp(path):
    text = path.read_text()
    if not path.name.startswith("lanes"):
        assert INTRINSICS.findall(text) == ALLOWED.get(path.name, [])
    if path.name != "parallel.h":
        assert OPENMP.findall(text) == []


def test_instructions_and_openmp_are_found():
    assert INTRINSICS.search("a = _mm256_add_ps(a, b);")
    assert INTRINSICS.search("float32x4_t a = vld1q_f32(p);")
    assert INTRINSICS.search("#include <immintrin.h>")
    assert OPENMP.search("#include <omp.h>")
    assert OPENMP.search("n = omp_get_max_threads()")
    assert any(INTRINSICS.search(path.read_text()) for path in sources("lanes_*.h"))
    assert OPENMP.search((SOURCES / "parallel.h").read_text())


def explains(text: str) -> list[str]:
    """What tells of errors in code of the loops, but for running out of memory."""
    code = "\n".join(map(code_of, without_docstrings(text).splitlines()))
    raised = re.findall(r"\braise\b(?! MemoryError\b).*", code)
    return raised + [text for text in re.findall(r'"([^"\n]* [^"\n]*)"', code) if text not in KERNEL_TEXTS]


@pytest.mark.parametrize("name", KERNELS)
def test_the_loops_know_no_errors(name):
    assert explains((SOURCES / name).read_text()) == []


def test_the_loops_raise_once():
    assert sum(len(re.findall(r"(?m)^\s*raise\b", (SOURCES / name).read_text())) for name in KERNELS) == 1


def test_errors_of_loops_are_found():
    assert explains("raise ValueError") == ["raise ValueError"]
    assert explains('cdef str text = "out of range"') == ["out of range"]
    assert explains('def f():\n    """Never raise "a text"."""\n    raise MemoryError  # raise this') == []


# ---- Who imports whom --------------------------------------------------------------------------------------------------

INNER = ["_arguments", "_errors", "_handle", "_runtime", "_slow", "layout"]
OUTER = {"table", "quantize", "ops", "lookup", "formats", "interop", "torch", "verdict", "pruning", "engines", "cli"}
# From within a function: `table` imports `_slow`.
LAZY = {("_slow", "table")}
# Rooms at the street: what they may not import, and which of them may import which.
ROOMS = {
    "formats": {"engines", "interop", "torch", "sklearn", "text", "verdict", "pruning", "cli"},
    "interop": {"engines", "torch", "sklearn", "text", "verdict", "pruning", "cli"},
    "torch": {"engines", "sklearn", "text", "verdict", "pruning", "cli"},
    "sklearn": {"engines", "interop", "torch", "text", "verdict", "pruning", "cli"},
    "text": {"engines", "torch", "sklearn", "verdict", "pruning", "cli"},
    "engines": {"torch", "sklearn", "text", "verdict", "pruning", "cli"},
    "verdict": {"engines", "interop", "torch", "sklearn", "text", "cli", "pruning"},
    "cli": {"torch", "sklearn", "text"},
}
COMPILED_NAMES = {"_handle", "_kernels", "_cpu", "_slow", "_slow_collection"}


def imported(text: str, *, lazily: bool = False, room: str | None = None) -> set[str]:
    """The package's modules and rooms that code imports at once, or from within functions; not for types alone."""
    found = set()
    waiting: list[tuple[ast.AST, bool]] = [(ast.parse(text), False)]
    while waiting:
        node, is_lazy = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        is_lazy |= isinstance(node, (ast.FunctionDef, ast.Lambda))
        if is_lazy == lazily:
            found |= modules_of(node, room)
        waiting += [(child, is_lazy) for child in ast.iter_child_nodes(node)]
    return found


def modules_of(node: ast.AST, room: str | None = None) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("qembag.")}
    if isinstance(node, ast.ImportFrom):
        if node.level == 1 and room is not None:
            return {room}
        whole = ("qembag." if node.level else "") + (node.module or "")
        parts = whole.rstrip(".").split(".")
        if parts[0] == "qembag":
            return {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return set()


def imported_by_cython(text: str) -> set[str]:
    """Those, of a .pyx with its parts."""
    found = re.findall(r"(?m)^ *from +(?:qembag)?\.?(\w*) +c?import +(\(?.*)", text)
    plain = re.findall(r"(?m)^ *c?import +(?:qembag\.)?(\w+)", text)
    return {name for name, _ in found} | set(re.findall(r"\w+", " ".join(rest for _, rest in found))) | set(plain)


@pytest.mark.parametrize("module", [name for name in INNER if name != "_handle"])
def test_imports_point_inwards(module):
    text = (SOURCES / f"{module}.py").read_text()
    assert imported(text) & OUTER == set()
    assert {(module, name) for name in imported(text, lazily=True) & OUTER} <= LAZY


IN_ROOMS = [path for room in ROOMS for path in sources(f"{room}/*.py")]


@pytest.mark.parametrize("path", IN_ROOMS, ids=names(IN_ROOMS))
def test_rooms_at_the_street_use_what_is_public(path):
    text, room = path.read_text(), path.parent.name
    everything = imported(text, room=room) | imported(text, room=room, lazily=True)
    assert everything & (COMPILED_NAMES | ROOMS[room]) == set()


def test_each_room_is_there():
    assert {path.parent.name for path in sources("*/*.py")} == set(ROOMS)


def test_the_handle_imports_no_module_of_the_package():
    inside = {path.stem for path in sources("**/*.py")} | {"_kernels"}
    for path in sources("_handle.pyx", "recognize.pxi", "run.pxi", "lookups.pxi", "operators.pxi", "collection.pxi"):
        assert imported_by_cython(path.read_text()) & inside == set(), path.name


@pytest.mark.parametrize("path", sources("**/*.py"), ids=names(sources("**/*.py")))
def test_only_the_runtime_names_the_kernels(path):
    assert path.name == "_runtime.py" or "_kernels" not in path.read_text()


def test_imports_are_found():
    text = """
    import qembag.cli
    from . import table
    from .quantize import quantize
    from .formats.tables import open_table
    from qembag.lookup import embedding
    if TYPE_CHECKING:
        from .layout import RowLayout
    def f():
        from .ops import g
    """
    assert imported(textwrap.dedent(text)) == {"cli", "table", "quantize", "formats", "lookup"}
    assert imported(textwrap.dedent(text), lazily=True) == {"ops"}
    assert imported("from .progress import check\nfrom ..table import Table", room="formats") == {"formats", "table"}
    assert imported("from . import progress\nfrom .. import _handle", room="cli") == {"cli", "_handle"}
    assert "table" in imported_by_cython("from .table import QuantizedTable")
    assert "table" in imported_by_cython("from . import table")
    assert "_kernels" in imported_by_cython("cimport _kernels")
    assert "_handle" in imported((SOURCES / "table.py").read_text())


# ---- The tree of CONTRIBUTING ------------------------------------------------------------------------------------------


def tree(text: str) -> set[str]:
    """The paths that the indented block under `src/qembag/` names."""
    block = re.search(r"(?m)^    src/qembag/\n(?:(?:    .*)?\n)*", text)
    paths = set()
    folders: dict[int, str] = {}
    for line in block[0].splitlines() if block else []:
        indent = len(line) - len(line.lstrip())
        listed = re.split(r" {2,}", line.strip())[0].split(", ")
        above = "".join(folder for depth, folder in sorted(folders.items()) if depth < indent)
        folders = {depth: folder for depth, folder in folders.items() if depth < indent}
        if len(listed) == 1 and listed[0].endswith("/"):
            folders[indent] = listed[0]
        paths |= {above + name for name in listed if name}
    return paths


def test_what_contributing_names_is_there():
    named = tree((ROOT / "CONTRIBUTING.md").read_text())
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
    assert {path.split("/")[0] for path in named} >= {"src", "tests", "benchmarks", "docs", "tools"}


def test_contributing_names_each_source_file():
    named = tree((ROOT / "CONTRIBUTING.md").read_text())
    there = {f"src/qembag/{path.relative_to(SOURCES)}" for path in SOURCES.rglob("*") if path.is_file()}
    there = {path for path in there if "__pycache__" not in path and not path.endswith(".so")}
    assert sorted(there - named) == []


def test_a_tree_is_read():
    text = """
# House

    src/qembag/
      a.py, b.h       two files
      c.py            another
    docs/             what to read
      speed.md        numbers
    .ci/run           the gate

    not/this
"""
    files = {"src/qembag/a.py", "src/qembag/b.h", "src/qembag/c.py", "docs/speed.md", ".ci/run"}
    assert tree(text.replace("\n    not/this\n", "")) == files | {"src/qembag/", "docs/"}
