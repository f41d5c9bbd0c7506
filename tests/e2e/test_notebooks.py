"""Every example notebook runs from top to bottom, and is committed as it ran."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import signal
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

reason = "needs the notebooks extra: pip install 'gft-lite[notebooks]'"
nbclient = pytest.importorskip("nbclient", reason=reason)
nbformat = pytest.importorskip("nbformat", reason=reason)
pytest.importorskip("ipykernel", reason=reason)
provisioning = pytest.importorskip("jupyter_client.provisioning", reason=reason)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
TIMEOUT = 300  # Seconds for one notebook.
# Settings that change the figures and not which code runs, and their values here.
SMALLER = {
    "00_quickstart.ipynb": {
        '"train.steps=30", "monitor.every=5", "eval.samples=4"':
            '"train.steps=3", "monitor.every=1", "eval.samples=4", "eval.sets.test.problems=8", '
            '"eval.sets.retention.problems=8", "monitor.problems=8"',
        "run.groups(30)": "run.groups(3)",
        'rows("test", 4)': 'rows("test", 1)',
    },
    "02_evaluate.ipynb": {
        '"train.steps=25"': '"train.steps=3", "eval.sets.test.problems=4", '
                            '"eval.sets.retention.problems=4"',
        '"samples=64", "limit=80"': '"samples=8", "limit=16"',
    },
    "03_tau_and_ratio.ipynb": {
        "train={steps: 8, problems_per_step: 12}": "train={steps: 1, problems_per_step: 4}",
        "test.problems=64": "test.problems=4",
        "retention.problems=30": "retention.problems=4",
        "[0, 0.7, 1]": "[0, 1]",
        "['8:0', '4:4', '0:8']": "['8:0', '0:8']",
        '"tau",\n    jobs=2': '"tau",\n    jobs=1',
        '"ratio",\n    jobs=2': '"ratio",\n    jobs=1',
    },
    "04_your_own_data_and_reward.ipynb": {
        "train: {steps: 25}": "train: {steps: 5, problems_per_step: 4}",
        "source: minimum_test.jsonl": "problems: 8\n      source: minimum_test.jsonl",
        "retention: {problems: 60}": "retention: {problems: 8}",
        "monitor: {every: 5}": "monitor: {every: 5, problems: 8}",
    },
    "06_referee.ipynb": {
        "train={steps: 8, problems_per_step: 8}": "train={steps: 1, problems_per_step: 1}",
        'methods=("gft", "sft", "grpo")': 'methods=("gft", "sft")',
        "problems: 60}": "problems: 4}",
        "problems: 30}": "problems: 4}",
        "tune=3": "tune=2",
        "jobs=2": "jobs=1",
    },
    "05_one_gpu_qwen_math.ipynb": {"budget.trajectories=128": "budget.trajectories=64"},
}  # fmt: skip
SOMEONES_PATH = re.compile(r"(?<![\w.])/(?:home|root|work|Users|tmp|mnt)/|[A-Z]:\\+Users")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


def read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook):
    return [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def texts(cell):
    """What a reader sees of a cell as text; base64 of images may hold any letters."""
    yield cell.source
    for output in cell.get("outputs", []):
        yield output.get("text", "")
        data = output.get("data", {})
        yield from (str(value) for kind, value in data.items() if not kind.startswith("image/"))


class ForkedKernel(provisioning.LocalProvisioner):
    """A kernel in a fork of a process that has imported the large libraries."""

    fork_server = None

    async def launch_kernel(self, cmd, **options):
        assert cmd[1:3] == ["-m", "ipykernel_launcher"]
        code = "from ipykernel import kernelapp; kernelapp.launch_new_instance()"
        with contextlib.chdir(options["cwd"]):
            forked = self.fork_server.start(*cmd[3:], code=code, env=options["env"])
        self.process = forked
        self.pid, self.cwd = forked.pid, options["cwd"]
        return self.connection_info

    async def wait(self):
        return self.process.wait()

    async def kill(self, restart=False):
        self.process.send_signal(signal.SIGKILL)

    async def terminate(self, restart=False):
        self.process.send_signal(signal.SIGTERM)


@pytest.fixture(autouse=True)
def forked_kernels(fork_server, monkeypatch):
    def create(factory, kernel_id, kernel_spec, parent):
        return ForkedKernel(kernel_id=kernel_id, kernel_spec=kernel_spec, parent=parent)

    monkeypatch.setattr(ForkedKernel, "fork_server", fork_server)
    monkeypatch.setattr(
        provisioning.KernelProvisionerFactory, "create_provisioner_instance", create
    )


async def execute(notebook, folder):
    """Runs the notebook in a real kernel that starts in `folder`."""
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", resources=resources
    )
    await asyncio.wait_for(client.async_execute(), TIMEOUT)


def test_there_are_notebooks():
    assert NOTEBOOKS, f"no notebook in {EXAMPLES}"


@every_notebook
def test_it_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    # The kernel inherits this: neither its history nor a stray run may land in the home folder.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Where there is a GPU, 05 would do the real run, which needs the hub and much time.
    monkeypatch.setenv("GFT_LITE_REHEARSAL", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    folder = tmp_path / "examples"
    shutil.copytree(EXAMPLES, folder, ignore=shutil.ignore_patterns(".*", "runs"))

    committed = code_cells(read(path))
    notebook = read(folder / path.name)
    for cell in code_cells(notebook):
        cell.outputs = []
    for setting, value in SMALLER.get(path.name, {}).items():
        [cell] = [c for c in code_cells(notebook) if setting in c.source]
        cell.source = cell.source.replace(setting, value)
    asyncio.run(execute(notebook, folder))  # Raises what a cell raised, with the cell.

    silent = [
        before.source
        for before, after in zip(committed, code_cells(notebook), strict=True)
        if before.outputs and not after.outputs
    ]
    assert not silent, "cells with committed outputs that now give none:\n" + "\n---\n".join(silent)
    kept = [work for work in folder.glob("runs/*") if any(work.iterdir())]
    assert len(kept) == (path.name != "01_objective.ipynb")  # Which writes no files.


@every_notebook
def test_it_opens_and_installs_itself_on_colab(path):
    """From the address in pyproject.toml; uv keeps a torch in the range of the overrides."""
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text("utf-8"))["project"]
    address = project["urls"]["Repository"]
    first, install, *_ = read(path).cells
    opened = address.replace("github.com", "colab.research.google.com/github")
    assert f"]({opened}/blob/main/examples/{path.name})" in first.source
    [pin] = [text for text in project["dependencies"] if re.match(r"torch\b", text)]
    written, override = re.search(r'!echo "torch(.*)" > (\S+)', install.source).groups()
    assert pin.removeprefix("torch==") in SpecifierSet(written)
    assert install.source.endswith(
        'if "google.colab" in sys.modules:\n'
        f'    !echo "torch{written}" > {override}\n'
        f'    !uv pip install --system --quiet --overrides {override} "git+{address}"'
    )


@every_notebook
def test_it_is_committed_as_it_ran(path):
    cells = code_cells(read(path))
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "was not executed once, from top to bottom"
    assert any(cell.outputs for cell in cells)
    errors = [o.ename for cell in cells for o in cell.outputs if o.output_type == "error"]
    assert errors == []


@every_notebook
def test_it_names_no_one_s_folders(path):
    found = [
        line
        for cell in read(path).cells
        for text in texts(cell)
        for line in text.splitlines()
        if SOMEONES_PATH.search(line)
    ]
    assert found == []
    assert not SOMEONES_PATH.search(str(read(path).metadata))
