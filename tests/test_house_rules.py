"""Rules of the house that no linter knows."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = ("megatron_qwen", "launch", "tools", "checkpoints_convert")
SOURCES = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
TESTS = list((ROOT / "tests").rglob("*.py"))
# Where torch and megatron-core are patched, one file a patch.
PATCHES = ROOT / "megatron_qwen" / "core_patches"
# What is imported in one file only, so that one file knows whether it is there.
ONE_FILE = {
    "transformer_engine": "te_backend/provider.py",
    "wandb": "metrics/wandb_writer.py",
    "apex": None,
    "submitit": "launch/submission.py",
    "fcntl": "megatron_qwen/files.py",
    "mkdocs": "tools/docs.py",
    "prometheus_client": "job/prometheus.py",
}
RENAMES_AND_SYNCS = {
    "os.rename", "os.renames", "os.replace", "shutil.move", "os.fsync", "os.fdatasync", "fcntl.flock", "fcntl.lockf"
}  # fmt: skip
# Private words and inversions that were in the tree once: docs/architecture.md has the terms to use instead. They are
# in two pieces each, so that this file does not contain them.
REFUSED_PHRASES = [
    " ".join(words)
    for words in (
        ("goes not", "with"),
        ("must divide", "by"),
        ("gone on", "with"),
        ("versions of", "the data"),
        ("lean", "optimizer"),
        ("likeliest", "token"),
        ("look it", "over"),
        ("drawn", "anew"),
        ("laid end", "to end"),
        ("for", "who "),
    )
]
TEXTS = [
    path
    for pattern in ("*.py", "*.md")
    for path in ROOT.rglob(pattern)
    if not any(part.startswith(".") or part == "build" for part in path.relative_to(ROOT).parts)
]
# Renames that are no way to write a file: by file, the call and why.
OTHER_RENAMES = {"launch/freeze.py": {"directory.code.rename": "moves the code of earlier jobs aside; writes nothing"}}


def of_every_file(paths: list[Path]) -> Callable[[Callable[[Path], None]], Callable[..., None]]:
    """Makes of a test of one file a test of all files in a folder, which names every one that does not pass."""
    folders: dict[str, list[Path]] = {}
    for path in paths:
        folders.setdefault("/".join(path.relative_to(ROOT).parts[:-1][:2]), []).append(path)

    def decorate(check: Callable[[Path], None]) -> Callable[..., None]:
        @pytest.mark.parametrize("folder", sorted(folders))
        def test(folder: str) -> None:
            found = []
            for path in folders[folder]:
                try:
                    check(path)
                except AssertionError as error:
                    found.append(f"{path.relative_to(ROOT)}: {error}")
            assert not found, "\n".join(found)

        return test

    return decorate


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@of_every_file(SOURCES)
def test_a_source_file(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a file says what its subject is"
    assert path.name not in {"utils.py", "helpers.py", "common.py", "misc.py"}
    assert "sys.path" not in text
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"line {node.lineno}: a global that changes"
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not inside_function(tree, node):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
    for name in imports(path):
        if "parallel_state" in name:
            assert path.name == "groups.py", "only groups.py reads megatron's global groups"
        owner = name.split(".")[0]
        if owner in ONE_FILE:
            assert path.match(str(ONE_FILE[owner])), f"{owner} is imported in one file only"


def too_long(text: str) -> list[str]:
    """What exceeds the limits on size: the file, or functions of it."""
    found = ["the file"] if text.count("\n") > 400 else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            found += [node.name] if lines > 80 else []
    return found


@of_every_file([*SOURCES, *TESTS])
def test_files_and_functions_are_short(path):
    assert too_long(path.read_text()) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x = 1\n" * 400, []),
        ("x = 1\n" * 401, ["the file"]),
        ("def f():\n" + "    x = 1\n" * 79, []),
        ("def f():\n" + "    x = 1\n" * 80, ["f"]),
        ("async def f():\n" + "    x = 1\n" * 80, ["f"]),
    ],
)
def test_what_the_rule_on_size_finds(text, found):
    assert too_long(text) == found


@of_every_file(SOURCES)
def test_help_texts_take_defaults_from_the_parser(path):
    """``(%(default)s)`` or a constant: a literal stays as it was when the default changes."""
    tree = ast.parse(path.read_text())
    # A help text that was given a name first, to keep the line short.
    named = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if not (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
        ):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        text = given.get("help")
        if isinstance(text, ast.Name):
            text = named.get(text.id)
        default = {
            str(one.value) for one in ast.walk(given.get("default", ast.Pass())) if isinstance(one, ast.Constant)
        }
        for part in literals(text):
            for words in re.findall(r"\(([^()%]+)\)", part):
                number = re.match(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?\b", words)
                assert number is None, f"line {node.lineno}: {words} is written out"
                assert words not in default, f"line {node.lineno}: {words} is written out"


def literals(text: ast.expr | None) -> list[str]:
    """The text of an expression that is written out in it, of f-strings the parts between the braces' values."""
    if text is None:
        return []
    if isinstance(text, ast.JoinedStr):
        # What stands in braces is computed: it leaves a mark that is no literal.
        return ["".join(str(one.value) if isinstance(one, ast.Constant) else "%" for one in text.values)]
    return [str(one.value) for one in ast.walk(text) if isinstance(one, ast.Constant)]


def inside_function(tree: ast.Module, inner: ast.FunctionDef) -> bool:
    """Whether a function is local to another, or one of the small stand-ins of a class without docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node is not inner and inner in ast.walk(node):
            return True
        if isinstance(node, ast.ClassDef) and node.name.startswith("_") and inner in ast.walk(node):
            return True
    return False


def renames_and_syncs(tree: ast.Module) -> Iterator[str]:
    """Calls that write-then-rename is made of; not the methods of the same name that strings and dataclasses have."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            # str.replace has two arguments; those of dataclasses.replace and datetime.replace have names.
            of_a_path = len(node.args) == 1 and not node.keywords and node.func.attr in ("rename", "renames", "replace")
            if of_a_path or ast.unparse(node.func) in RENAMES_AND_SYNCS:
                yield ast.unparse(node.func)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("temporary.replace(path)", True),
        ("path.with_name('a').rename(target)", True),
        ("os.replace(temporary, path)", True),
        ("os.rename(temporary, path)", True),
        ("os.fsync(file.fileno())", True),
        ("fcntl.lockf(file, fcntl.LOCK_EX)", True),
        ("text.replace('a', 'b')", False),
        ("replace(config, seed=1)", False),
        ("dataclasses.replace(config, seed=1)", False),
        ("moment.replace(microsecond=0)", False),
    ],
)
def test_what_the_rule_on_files_finds(code, found):
    assert bool(list(renames_and_syncs(ast.parse(code)))) == found


def test_files_are_replaced_synced_and_locked_in_one_file():
    calls = {}
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        assert not RENAMES_AND_SYNCS.intersection(imports(path)), (
            f"{name}: import the module, so that this test sees it"
        )
        if name != "megatron_qwen/files.py" and (found := set(renames_and_syncs(ast.parse(path.read_text())))):
            calls[name] = found
    assert calls == {name: set(listed) for name, listed in OTHER_RENAMES.items()}


def test_cuda_is_asked_in_one_file():
    for path in SOURCES:
        if path.name != "device.py" and path.parent != PATCHES:
            assert "torch.cuda" not in path.read_text(), path


@of_every_file(SOURCES)
def test_only_core_patches_changes_other_libraries(path):
    if path.parent != PATCHES:
        assert list(changes_of_libraries(ast.parse(path.read_text()))) == []


LIBRARIES = ("torch", "megatron", "transformer_engine", "apex")


def changes_of_libraries(tree: ast.Module) -> Iterator[str]:
    """Lines that replace something in torch or megatron-core: in a module, in a class, or a method of one object."""
    names = names_of_libraries(tree)
    for node in ast.walk(tree):
        line = f"line {getattr(node, 'lineno', 0)}: {ast.unparse(node)[:80]}"
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete):
            targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [node.target]
            stored = [part for target in targets for part in ast.walk(target) if is_stored(part)]
            value = getattr(node, "value", None)
            method = isinstance(value, ast.Call) and ast.unparse(value.func).endswith("MethodType")
            if any(belongs_to(part, names) for part in stored) or (method and stored):
                yield line
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if function in ("setattr", "delattr") and root_of(node.args[0]) in names:
                yield line
            if function.rpartition(".")[0] == "sys.modules" and not function.endswith((".get", ".items", ".values")):
                yield line


def names_of_libraries(tree: ast.Module) -> set[str]:
    """Names that a file has imported from these libraries, and names that it has given to attributes of them."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            for alias in node.names:
                if (module or alias.name).split(".")[0] in LIBRARIES:
                    names.add(alias.asname or alias.name.split(".")[0])
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Name | ast.Attribute):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if root_of(node.value) in names:
                names.update(target.id for target in targets if isinstance(target, ast.Name))
    return names


def is_stored(node: ast.AST) -> bool:
    """Whether an attribute or an item is assigned or deleted here, not a name."""
    return isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load)


def belongs_to(node: ast.AST, names: set[str]) -> bool:
    """Whether it is reached from one of these names, or from sys.modules."""
    return root_of(node) in names or ast.unparse(node).startswith("sys.modules")


def root_of(node: ast.AST) -> str:
    """The name at the beginning of a chain of attributes and items."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.empty = None",
        "import torch.distributed as dist\ndist.all_gather, x = None, None",
        "import torch._inductor.config\ntorch._inductor.config.compile_threads = 1",
        "from megatron.core.optimizer import clip_grads\ndef f():\n    other: Any = clip_grads\n    other.scale = None",
        "from megatron.core.models.gpt import GPTModel\nsetattr(GPTModel, 'forward', None)",
        "from megatron.core import utils\nutils.table['a'] += 1",
        "import torch\ndel torch.Tensor.cuda",
        "part.state = MethodType(state, part)",
        "import sys\nsys.modules['apex'] = None",
        "import sys\nsys.modules.setdefault('apex', None)",
    ],
)
def test_a_change_of_a_library_is_seen(text):
    assert len(list(changes_of_libraries(ast.parse(text)))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "import torch\nweight = torch.empty(3)\nweight.shared = True",
        "import torch\nempty = torch.empty\nempty(3)",
        "core.grad_scale_func = scale",
        "import sys\nsys.modules.get('torch')",
        "from megatron.core import utils\nsetattr(self, 'utils', utils)",
    ],
)
def test_other_assignments_are_fine(text):
    assert list(changes_of_libraries(ast.parse(text))) == []


def test_texts_use_the_terms_of_the_field():
    refused = re.compile("|".join(rf"\b{phrase}" for phrase in REFUSED_PHRASES), flags=re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match.group()}"
        for path in TEXTS
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if (match := refused.search(line))
    ]
    assert not found, "say it in the words of the field:\n" + "\n".join(found)


def long_lines(text: str) -> list[int]:
    """Numbers of the Markdown lines over 120 characters, except table rows, which cannot be broken."""
    lines = enumerate(text.splitlines(), start=1)
    return [number for number, line in lines if len(line) > 120 and not line.startswith("|")]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a " * 61, [1]),
        ("a " * 60, []),
        ("| " + "a " * 61, []),
        ("![" + "a " * 61 + "](image.png)", [1]),
        ("```\n" + "a " * 61 + "\n```", [2]),
    ],
)
def test_what_the_rule_on_lines_finds(text, found):
    assert long_lines(text) == found


@of_every_file([path for path in TEXTS if path.suffix == ".md"])
def test_lines_of_markdown_are_short(path):
    assert not long_lines(path.read_text()), f"lines of {path.relative_to(ROOT)} over 120 characters"
