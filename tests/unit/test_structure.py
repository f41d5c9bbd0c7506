"""The layout of the packages: layers, cycles, sizes, and what every package declares."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from benchmarks import structure
from benchmarks.structure import PACKAGE, ROOT, Function, Structure

SOURCE = ROOT / PACKAGE
FILES = sorted(SOURCE.rglob("*.py"))
PACKAGES = sorted(file for file in FILES if file.name == "__init__.py")


@pytest.fixture(scope="module")
def measured() -> Structure:
    return structure.measure()


def relative(file: Path) -> str:
    return str(file.relative_to(SOURCE))


def test_the_layers_contract_is_kept_and_has_no_exceptions():
    [contract] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
    assert contract["type"] == "layers"
    assert contract["exhaustive"] is True
    assert not {"ignore_imports", "unmatched_ignore_imports_alerting"} & set(contract)
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_nothing_imports_in_a_circle(measured):
    """Imports inside functions and under TYPE_CHECKING count as well."""
    assert structure.cycles(measured.all) == []
    assert structure.cycles(structure.packages(measured.all)) == []


def test_nothing_inside_imports_the_public_api(measured):
    assert {name for name, imported in measured.all.items() if PACKAGE in imported} == set()


def test_only_four_modules_lie_beside_the_packages():
    assert {file.name for file in SOURCE.glob("*.py")} == {
        "__init__.py", "__main__.py", "types.py", "version.py",
    }  # fmt: skip


@pytest.mark.parametrize("file", PACKAGES, ids=relative)
def test_a_package_describes_itself_and_lists_its_names(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    bound = {path.stem for path in file.parent.glob("*.py")}
    bound |= {path.parent.name for path in file.parent.glob("*/__init__.py")}
    listed = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            bound |= names
            if "__all__" in names and node.value is not None:
                listed = [c.value for c in ast.walk(node.value) if isinstance(c, ast.Constant)]
    assert listed, "__all__ must name something"
    assert len(set(listed)) == len(listed)
    assert set(listed) <= bound


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_a_module_says_what_it_is_for_and_uses_no_private_name_of_another(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree) or ""
    assert docstring and "TODO" not in docstring
    private = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE)
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert private == []


def test_no_file_is_longer_than_400_lines(measured):
    assert {file: lines for file, lines in measured.files.items() if lines > 400} == {}


def test_no_function_is_longer_than_60_lines(measured):
    assert [function for function in measured.functions if function.lines > 60] == []


def test_a_training_step_is_four_files(measured):
    loop, *others = structure.STEP_FILES
    assert measured.files[loop] <= 200
    assert sum(measured.files[file] for file in (loop, *others)) <= 950


class TestMeasure:
    """The measurements themselves, on a package written for them."""

    @pytest.fixture
    def small(self, tmp_path) -> Structure:
        for name, text in {
            "__init__.py": "",
            "low.py": "def f(a, *, b):\n    return a\n",
            "mid.py": "from gft_lite.low import f\ndef g():\n    from gft_lite import top\n",
            "top.py": "import gft_lite.mid\nif TYPE_CHECKING:\n    import gft_lite.one.x\n",
            "one/__init__.py": "",
            "one/x.py": "from gft_lite import low\nclass C:\n    async def h(self):\n        1\n",
        }.items():
            file = tmp_path / PACKAGE / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return structure.measure(tmp_path)

    def test_eager_imports_are_those_that_run(self, small):
        assert small.eager["gft_lite.mid"] == {"gft_lite.low"}
        assert small.all["gft_lite.mid"] == {"gft_lite.low", "gft_lite.top"}
        assert small.eager["gft_lite.top"] == {"gft_lite.mid"}
        assert small.all["gft_lite.top"] == {"gft_lite.mid", "gft_lite.one.x"}

    def test_levels_and_cycles(self, small):
        assert structure.levels(small.eager) == {
            "gft_lite": 1, "gft_lite.low": 1, "gft_lite.one": 1, "gft_lite.mid": 2,
            "gft_lite.one.x": 2, "gft_lite.top": 3,
        }  # fmt: skip
        assert structure.cycles(small.eager) == []
        assert structure.cycles(small.all) == [{"gft_lite.mid", "gft_lite.top"}]
        assert structure.arrows_in_cycles(small.all) == 2

    def test_lines_and_parameters(self, small):
        assert small.files["low.py"] == 2
        assert set(small.functions) == {
            Function("low.py", "f", 2, 2), Function("mid.py", "g", 2, 0),
            Function("one/x.py", "h", 2, 1),
        }  # fmt: skip

    def test_packages_stand_for_their_modules(self, small):
        assert structure.packages(small.all)["gft_lite.top"] == {"gft_lite.mid", "gft_lite.one"}
        assert structure.packages(small.all)["gft_lite.one"] == {"gft_lite.low"}
