"""Code and servers that a recipe names: those of files from elsewhere need `--allow-code`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gft_lite.objective.methods import METHODS
from gft_lite.recipe.loader import COMMAND_LINE, find_recipe, gather
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import PolicySettings
from gft_lite.rewards.registry import REWARDS, is_judge
from gft_lite.rollout.registry import ENGINES
from gft_lite.utils.errors import UserError
from gft_lite.utils.paths import PACKAGE

if TYPE_CHECKING:
    from gft_lite.evaluation.suites import Suite


_SHIPPED = (PACKAGE.parent / "recipes", PACKAGE.parent / "configs", PACKAGE / "shipped")


def check_code_trust(code: Iterable[str], files: Iterable[str | Path]) -> None:
    """Check that `code`, which `files` name, may run without --allow-code.

    Raises: UserError with all the code that would run if one of the files, or a base that it
    extends, is outside the working directory and not shipped.
    """
    named = list(dict.fromkeys(code))
    foreign = sorted({file for path in files for file in _sources(path) if not _is_trusted(file)})
    if named and foreign:
        rule = "must be given to run code or use servers that a file from elsewhere may name"
        got = f"got {', '.join(foreign)} with {', '.join(named)}"
        raise UserError([f"--allow-code: {rule}, {got}. Look at it, then add --allow-code."])


def named_code(settings: Recipe | Suite) -> Iterator[str]:
    """`field: dotted path` of all code that is not in a table of the package, and all servers."""
    named = [("rollout.engine", settings.rollout.engine, set(ENGINES))]
    functions = settings.reward.functions
    named += [("reward.functions", f.name, set(REWARDS)) for f in functions if not is_judge(f.name)]
    if isinstance(settings, Recipe):
        named.append(("method", settings.method, set(METHODS)))
    yield from (f"{field}: {name}" for field, name, table in named if name not in table)
    servers = settings.rollout.servers
    yield from (f"rollout.servers: {url}, which gets prompts and the key" for url in servers)
    judges = [f.parameters.get("url") for f in functions if is_judge(f.name)]
    yield from (f"reward.functions: judge at {url}, which gets answers and a key" for url in judges)
    yield from remote_code(settings.policy)
    if isinstance(settings, Recipe):
        for number in range(len(settings.stages)):
            yield from named_code(settings.stage(number))


def remote_code(policy: PolicySettings) -> Iterator[str]:
    """The code in the model's repository, if the settings trust it."""
    if policy.trust_remote_code:
        yield f"policy.trust_remote_code: true, the code of {policy.model}"


def check_task_trust(folder: str) -> None:
    """Check that the task files of lm-evaluation-harness in a folder may run their code.

    Raises: UserError if a folder outside the working directory has Python files, or task files with
    the functions of one.
    """
    root = Path(folder)
    files = [
        *root.rglob("*.py"),
        *(f for f in root.rglob("*.yaml") if b"!function" in f.read_bytes()),
    ]
    if files and not _is_trusted(folder):
        rule = "must be given to run code of task files from elsewhere"
        raise UserError(
            [f"--allow-code: {rule}, got {files[0]}. Look at it, then add --allow-code."]
        )


def _sources(path: str | Path) -> set[str]:
    """The file and all files that it extends."""
    places = gather(find_recipe(path))[1]
    return {place.file for place in places.values()} - {COMMAND_LINE}


def _is_trusted(file: str) -> bool:
    path = Path(file).resolve()
    return any(path.is_relative_to(root.resolve()) for root in (Path.cwd(), *_SHIPPED))
