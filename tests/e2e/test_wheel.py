"""The wheel works outside the checkout: recipes and the lab's base are found in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that the wheel was installed into."""
    folder = tmp_path_factory.mktemp("wheel")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target",
               str(folder), str(ROOT)]  # fmt: skip
    done = subprocess.run(install, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return folder


def run(installed, cwd, *arguments):
    """The wheel's command line, from a folder that has nothing of the project."""
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); from gft_lite.cli import main; "
    return subprocess.run(
        [sys.executable, "-P", "-c", code + f"sys.exit(main({list(arguments)!r}))"],
        cwd=cwd, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip


def test_it_trains_the_lab_from_anywhere(installed, tmp_path):
    small = ["train.steps=1", "train.problems_per_step=2", "eval.samples=1", "eval.k=[1]",
             "eval.sets.test.problems=2", "eval.sets.retention.problems=2"]  # fmt: skip
    done = run(installed, tmp_path, "train", "recipes/lab.yaml", *small)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "lab" / "adapter" / "adapter_model.safetensors").exists()


def test_shipped_recipes_and_their_fragments_are_found(installed, tmp_path):
    done = run(installed, tmp_path, "train", "recipes/qwen_math_1p5b.yaml", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "Qwen/Qwen2.5-Math-1.5B" in done.stdout
    done = run(installed, tmp_path, "plan", "recipes/qwen_math_1p5b.yaml")
    assert done.returncode == 0, done.stderr


def test_it_is_the_wheel_that_ran(installed, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); import gft_lite; "
    done = subprocess.run(
        [sys.executable, "-P", "-c", code + "print(gft_lite.__file__)"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert Path(done.stdout.strip()).is_relative_to(installed)
    names = {p.name for p in installed.glob("gft_lite/lab/base/*")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
