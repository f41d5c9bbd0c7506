"""Tests of the numbered statements of SECURITY.md; it names the others."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from gft_lite.cli import main
from gft_lite.objective.methods import METHODS
from gft_lite.recipe.schema import Recipe
from gft_lite.rewards.base import RewardFunction
from gft_lite.rewards.registry import JUDGE, REWARDS
from gft_lite.rewards.scorer import Scorer
from gft_lite.types import Group, Problem, Response
from gft_lite.utils.errors import RecipeError, UserError
from gft_lite.utils.secrets import find_secret, redact

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["train.steps=1", "train.problems_per_step=1", "eval.samples=1", "eval.k=[1]",
         "eval.sets.test.problems=2", "eval.sets.retention.problems=2", "monitor.problems=1",
         "data.problems=8"]  # fmt: skip
TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ0123"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working directory, inside a folder with other files."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_every_test_that_security_md_names_exists():
    text = (ROOT / "SECURITY.md").read_text()
    names = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(names) >= 10
    for file, name in names:
        assert re.search(rf"(def|class) {name}\b", (ROOT / file).read_text()), (file, name)


# --- code ------------------------------------------------------------------------------------


def test_yaml_creates_no_objects(here):
    for tag in ("python/object/apply:os.system", "python/object/new:os.system", "python/name:os",
                "python/module:os", "python/object/apply:subprocess.Popen"):  # fmt: skip
        write(here / "x.yaml", f"name: !!{tag} ['touch pwned']\n")
        with pytest.raises(RecipeError, match="must be valid YAML"):
            Recipe.load("x.yaml")
    assert not Path("pwned").exists()


def test_a_dry_run_and_a_plan_run_nothing_that_a_recipe_names(here, capsys):
    write(here / "other.py", "open('pwned', 'w')\nm = reward = engine = None\n")
    names = (
        "method: other:method\nreward: {functions: other:reward}\nrollout: {engine: other:engine}\n"
    )
    write(here / "x.yaml", names)
    assert main(["train", "x.yaml", "--dry-run"]) == 0
    assert "other:reward" in capsys.readouterr().out
    assert main(["plan", "x.yaml"]) == 0
    assert not Path("pwned").exists()


FOREIGN = {
    "reward": ("reward: {functions: 'os:system'}\n", "reward.functions: os:system"),
    "method": ("method: evil:method\n", "method: evil:method"),
    "engine": ("rollout: {engine: evil.Engine}\n", "rollout.engine: evil.Engine"),
    "servers": (
        "rollout: {engine: vllm_server, servers: ['https://evil.example']}\n",
        "rollout.servers: https://evil.example, which gets prompts and the key",
    ),
    "model": (
        "policy: {model: a/b, trust_remote_code: true}\n",
        "policy.trust_remote_code: true, the code of a/b",
    ),
    "stage": (
        "stages: [sft, {method: gft, overrides: {reward: {functions: ['os:system']}}}]\n",
        "reward.functions: os:system",
    ),
    "merge key": ("reward: {<<: {functions: 'os:system'}}\n", "reward.functions: os:system"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("how", ["itself", "extended", "linked"])
def test_code_that_a_recipe_from_elsewhere_names_needs_allow_code(kind, how, here, capsys):
    text, error = FOREIGN[kind]
    elsewhere = write(here.parent / "downloads" / "x.yaml", text)
    path = elsewhere
    if how == "extended":
        path = write(here / "other.yaml", f"extends: {elsewhere}\nreward: {{workers: 1}}\n")
    elif how == "linked":
        path = here / "link.yaml"
        path.symlink_to(elsewhere)
    assert main(["train", str(path)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("--allow-code: must be given to run code")
    assert error in errors and errors.rstrip().endswith("then add --allow-code.")
    # A sweep of it gives the same error.
    assert main(["sweep", str(path), "--grid", "optim.lr=1e-3,1e-4"]) == 2
    assert error in capsys.readouterr().err
    assert not any(here.glob("runs"))


def test_with_allow_code_it_runs(here, capsys):
    write(here / "other.py", "def reward(completions, **_):\n    raise OSError('it ran')\n")
    text = "extends: recipes/lab.yaml\nreward: {functions: 'other:reward'}\n"
    elsewhere = write(here.parent / "downloads" / "x.yaml", text)
    assert main(["train", str(elsewhere), *SMALL, "--allow-code"]) == 2
    assert "reward 'other:reward': must not raise, got OSError: it ran" in capsys.readouterr().err


def test_local_code_and_foreign_recipes_without_code_need_no_flag(here):
    from gft_lite.cli.trust import check_code_trust, named_code

    own = write(here / "sub" / "other.yaml", "reward: {functions: 'other:reward'}\n")
    plain = write(here.parent / "downloads" / "x.yaml", "extends: recipes/lab.yaml\nseed: 5\n")
    for path in (own, plain, "recipes/lab.yaml", ROOT / "recipes" / "lab.yaml"):
        check_code_trust(named_code(Recipe.load(path)), [path])
    assert list(named_code(Recipe.load(own))) == ["reward.functions: other:reward"]
    with pytest.raises(UserError, match="--allow-code"):
        check_code_trust(named_code(Recipe.load(own)), [own, plain])


def test_a_suite_and_a_run_from_elsewhere_need_allow_code(here, capsys):
    downloads = here.parent / "downloads"
    suite = write(
        downloads / "s.yaml", "definitions: {a: {source: lab}}\nreward: {functions: e:f}\n"
    )
    assert main(["eval", "lab", "--suite", str(suite)]) == 2
    assert "reward.functions: e:f" in capsys.readouterr().err
    run = downloads / "run"
    write(run / "recipe.yaml", "policy: {model: a/b, trust_remote_code: true}\n")
    write(run / "adapter" / "adapter_config.json", json.dumps({"r": 4, "peft_type": "LORA"}))
    write(run / "adapter" / "adapter_model.safetensors", "")
    for command in (["eval", str(run), "--suite", "lab"], ["report", str(run)]):
        assert main(command) == 2
        assert "policy.trust_remote_code: true, the code of a/b" in capsys.readouterr().err


def test_remote_code_is_not_trusted_by_default():
    assert Recipe.from_tree({}).policy.trust_remote_code is False
    for path in [*ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("configs/**/*.yaml")]:
        assert "trust_remote_code" not in path.read_text(), path
    calls = [line for path in ROOT.glob("gft_lite/**/*.py")
             for line in path.read_text().splitlines()
             if re.search(r"trust_remote_code(=|\": )(?!bool)", line)]  # fmt: skip
    assert calls
    allowed = ("settings.trust_remote_code", "policy.trust_remote_code")  # Both the recipe's.
    assert all(any(name in line for name in allowed) for line in calls), calls


def test_the_package_neither_evaluates_nor_unpickles():
    banned = {"eval", "exec", "compile", "pickle.load", "pickle.loads", "torch.load", "yaml.load",
              "yaml.unsafe_load", "os.system", "os.popen", "np.load", "joblib.load"}  # fmt: skip
    found, calls = [], 0
    for path in ROOT.glob("gft_lite/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                calls += 1
                shell = any(keyword.arg == "shell" for keyword in node.keywords)
                if ast.unparse(node.func) in banned or shell:
                    found.append((path.name, ast.unparse(node)))
    assert calls > 1000
    assert not found


# --- model text ------------------------------------------------------------------------------

HOSTILE = [
    "__import__('os').system('touch pwned')",
    "exec(\"open('pwned','w')\")",
    "open('pwned','w')",
    "(lambda: open('pwned','w'))()",
    r"\operatorname{open}(\text{pwned}, \text{w})",
    "[c for c in ().__class__.__base__.__subclasses__()]",
    "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
    "$(touch pwned) `touch pwned` ; touch pwned",
    "9**9**9**9",
    r"\input{/etc/passwd} \write18{touch pwned}",
    "\0\x1b]0;x\x07\ud83d",
]


def test_text_of_a_model_reaches_no_interpreter(here):
    rows = [f"#{t}" for t in HOSTILE] + [rf"\boxed{{{t}}}" for t in HOSTILE] + HOSTILE
    responses = tuple(Response((1,), text, "self", "stop") for text in rows)
    functions = [RewardFunction(name) for name in REWARDS if name != JUDGE]
    with Scorer(functions, workers=1) as scorer:
        for answer in ("3", HOSTILE[0], HOSTILE[2]):
            [group] = scorer.score([Group(Problem("1", "1+2=", answer), responses)])
            assert any(r.reward_parts["math"] for r in group) == (answer != "3")
    assert not Path("pwned").exists()


# --- secrets ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        (f"401 for {TOKEN}", "401 for ***"),
        ("see https://me:pass@hub.example/x", "see https://***@hub.example/x"),
        ("key is wandb-0123456789abcdef", "key is ***"),
        (f"{TOKEN} and {TOKEN}", "*** and ***"),
        ("nothing here, hf_cache, a@b.c, https://hub.example/@me", None),
    ],
)
def test_secrets_are_recognised(text, redacted, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "wandb-0123456789abcdef")
    monkeypatch.setenv("SOME_KEY", "short")
    assert redact(text) == (redacted or text)
    assert (find_secret(text) is None) == (redacted is None)
    assert redact("a short text") == "a short text"


@pytest.mark.parametrize("value", [TOKEN, "https://me:pass@hub.example", "0123456789-from-the-env"])
def test_a_recipe_holds_no_secret(value, here, monkeypatch, capsys):
    monkeypatch.setenv("MY_SECRET", "0123456789-from-the-env")
    rule = "reward.functions.0.parameters.key: must not hold a token or a password, got one."
    text = f"reward: {{functions: [{{name: 'my:f', parameters: {{key: '{value}'}}}}]}}\n"
    write(here / "x.yaml", text)
    assert main(["train", "x.yaml", "--dry-run"]) == 2
    out, errors = capsys.readouterr()
    assert errors.startswith(f"x.yaml:1: {rule}") and value not in out + errors
    write(here / "x.yaml", "seed: 1\n")
    assert main(["train", "x.yaml", f"policy.revision={value}", "--dry-run"]) == 2
    assert value not in "".join(capsys.readouterr())


def test_no_token_in_what_a_run_writes_nor_in_its_errors(here, monkeypatch, capfd):
    """A finished run, a model that the hub rejects, and a reward with the token in its error."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    write(
        here / "leak.py",
        "import os\ndef reward(**_):\n    raise KeyError(os.environ['HF_TOKEN'])\n",
    )
    small = [*SMALL, "log.trackers=[tensorboard]"]
    assert main(["train", "recipes/lab.yaml", *small, "--out", "run"]) == 0
    assert main(["train", "recipes/lab.yaml", "policy.model=no/such-model"]) == 2
    other = [*small, "reward.functions=[leak:reward]", "--out", "other"]
    assert main(["train", "recipes/lab.yaml", *other]) == 2
    out, errors = capfd.readouterr()
    assert "got KeyError: '***'" in errors
    assert TOKEN not in out + errors
    files = [path for path in here.rglob("*") if path.is_file()]
    assert {"recipe.yaml", "metrics.jsonl", "summary.json"} <= {path.name for path in files}
    assert any("tfevents" in path.name for path in files)
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


# --- paths -----------------------------------------------------------------------------------


def test_names_in_data_are_not_used_as_paths(here):
    """Problem ids, set names and texts that look like paths create no file outside."""
    names = ("../../x", "/tmp/gft-lite-x", "a/b", "..", "x\0y", "~/x")
    row = {"problem": "011-012+131....=", "answer": "130", "expert": "@011;004;130#130"}
    rows = [row | {"id": name} for name in names]
    write(here / "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    own = ["data.source=x.jsonl", "data.columns.expert=expert", "data.columns.id=id",
           "data.holdout=1", "group.teacher=0", "eval.k=[1]", "eval.samples=1", "train.steps=1",
           "train.problems_per_step=5", "monitor.problems=1", "eval.sets.test.problems=1",
           "eval.sets={'../../up': {source: x.jsonl, columns: {id: id}}}",
           "eval.sets.retention.problems=1"]  # fmt: skip
    assert main(["train", "recipes/lab.yaml", *own, "--out", "runs/in"]) == 0
    suite = {"name": "s", "definitions": {"a": {"source": "x.jsonl", "columns": {"id": "id"}}},
             "samples": 1, "drift": 1}  # fmt: skip
    write(here / "s.yaml", yaml.safe_dump(suite))
    assert main(["eval", "runs/in", "--suite", "s.yaml", "rollout.max_tokens=16"]) == 0
    made = {path.relative_to(here).parts[0] for path in here.rglob("*")}
    assert made == {"x.jsonl", "s.yaml", "runs"}
    assert [path.name for path in here.parent.iterdir()] == ["here"]
    assert not Path("/tmp/gft-lite-x").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", "..", "", ".x", "a\0b", "~"])
@pytest.mark.parametrize("where", ["recipe", "suite", "benchmark", "sweep"])
def test_names_that_become_folders_are_plain(name, where, here, capsys):
    tree = {
        "recipe": {"name": name},
        "suite": {"name": name, "definitions": {"a": {"source": "lab"}}},
        "benchmark": {"definitions": {name: {"source": "lab"}}},
        "sweep": {"name": name, "recipe": "recipes/lab.yaml"},
    }[where]
    write(here / "x.yaml", yaml.safe_dump(tree))
    command = {"recipe": ["train", "x.yaml"], "sweep": ["sweep", "x.yaml"]}
    assert main(command.get(where, ["eval", "lab", "--suite", "x.yaml"])) == 2
    assert "to name a " in capsys.readouterr().err


def test_methods_that_are_dotted_paths_name_plain_folders():
    for path in (*METHODS, "my.mod:loss", "a..b:c"):
        [stage] = Recipe.from_tree({"stages": [path]}).stages
        assert "/" not in stage.method
    for path in ("../up:x", "a/b:c", "/a:b"):
        with pytest.raises(RecipeError, match=r"stages\.0\.method"):
            Recipe.from_tree({"stages": [path]})
