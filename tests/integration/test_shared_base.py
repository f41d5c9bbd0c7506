"""Runs that share a loaded base and an engine, against runs that load and start their own."""

from __future__ import annotations

import gc
import importlib.util
import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from gft_lite.policy.registry import load_policy
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import PolicySettings, RolloutSettings
from gft_lite.rollout.transformers_engine import TransformersEngine
from gft_lite.rollout.vllm_common import start_inputs
from gft_lite.runs.folder import RunFolder
from gft_lite.training.run import train
from gft_lite.training.shared_parts import SharedParts

pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = Console(quiet=True)
SMALL = [
    "train.steps=2", "train.problems_per_step=2", "data.problems=24", "data.holdout=4",
    "monitor.every=1", "monitor.problems=2", "eval.samples=1", "eval.k=[1]",
    "eval.sets.test.problems=2", "eval.sets.retention.problems=2", "checkpoint.every=1",
]  # fmt: skip
# As different as two runs on one base can be.
FIRST = [
    "optim.lr=1e-2",
    "policy.gradient_checkpointing=true",
    "policy.lora.dropout=0.1",
]
SECOND = [
    "seed=1", "method=grpo", "group.expert=0", "group.teacher=0", "policy.layout=padded",
    "policy.context=200",
]  # fmt: skip
KEPT = "base: of the run before, engine: of the run before"
ENGINE = RolloutSettings(engine="transformers")


def small(*changes):
    return Recipe.load("recipes/lab.yaml", [*SMALL, "rollout.engine=transformers", *changes])


def results(run):
    """Everything that a run writes down, without times and memory."""
    metrics, summary = run.metrics(), run.summary()
    for each in (*metrics, summary):
        each.pop("seconds")
        each.pop("peak_memory", None)
    evaluations = [json.loads((run.path / f"eval/{n}.json").read_text())
                   for n in ("base", "trained")]  # fmt: skip
    weights = load_file(run.adapter / "adapter_model.safetensors")
    return (
        metrics,
        summary,
        evaluations,
        {name: w.tolist() for name, w in weights.items()},
    )


def live():
    """The tensors and modules that the garbage collector knows."""
    gc.unfreeze()
    gc.collect()
    kinds = [type(each) for each in gc.get_objects()]
    return [sum(issubclass(kind, of) for kind in kinds) for of in (torch.Tensor, torch.nn.Module)]


def train_printing(recipe, out, parts, **options):
    """The run, and what it printed."""
    console = Console(file=StringIO(), width=200)
    run = train(recipe, out, console=console, shared=parts, **options)
    return run, console.file.getvalue()


class TestRuns:
    @pytest.fixture(scope="class")
    def alone(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("alone")
        return [train(small(*changes), folder / name, console=QUIET)
                for name, changes in (("first", FIRST), ("second", SECOND))]  # fmt: skip

    def test_in_any_order_they_equal_runs_of_their_own_and_leave_nothing(self, alone, tmp_path):
        counts = {}
        with SharedParts() as parts:
            for number, index in enumerate((0, 1, 0)):
                recipe = small(*(FIRST, SECOND)[index])
                run, printed = train_printing(recipe, tmp_path / str(number), parts)
                assert ("base: of the run before" in printed) == (number > 0)
                assert results(run) == results(alone[index])
                if number != 1:
                    counts[number] = live()
        assert counts[2] == counts[0]

    def test_a_run_that_was_interrupted_resumes_on_a_shared_base(self, alone, tmp_path):
        """The folder is as after the checkpoint of its first step."""
        run = RunFolder(shutil.copytree(alone[1].path, tmp_path / "run"))
        for name in ("checkpoints/step-000002", "adapter"):
            shutil.rmtree(run.path / name)
        for name in ("summary.json", "eval/trained.json"):
            (run.path / name).unlink()
        with SharedParts() as parts:
            train(small(*FIRST), tmp_path / "before", console=QUIET, shared=parts)
            _, printed = train_printing(small(*SECOND), run.path, parts, resume=True)
        assert "base: of the run before" in printed
        assert "step 1/2" not in printed
        assert results(run) == results(alone[1])

    def test_without_quantisation(self, tmp_path):
        second = small(*SECOND, "policy.quantization=none")
        with SharedParts() as parts:
            train(small(*FIRST, "policy.quantization=none"), tmp_path / "1", shared=parts,
                  console=QUIET)  # fmt: skip
            run, printed = train_printing(second, tmp_path / "2", parts)
        assert "base: of the run before" in printed
        assert results(run) == results(train(second, tmp_path / "alone", console=QUIET))

    def test_the_stages_of_a_run_share(self, tmp_path):
        run, printed = train_printing(
            small("stages=[sft, {method: grpo, reference: start}]", "train.steps=1"),
            tmp_path / "run",
            None,
        )
        assert printed.count("base: of the run before") == 1
        second = RunFolder(run.path / "stages" / "2-grpo")
        recipe = Recipe.load(second.path / "recipe.yaml")
        assert recipe.policy.reference == "adapter"
        assert results(second) == results(train(recipe, tmp_path / "alone", console=QUIET))


@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason='needs vllm: pip install "gft-lite[vllm]"',
)
def test_runs_on_a_shared_vllm_equal_runs_of_their_own(tmp_path):
    """The context is part of what vLLM starts with; the adapters differ in all but their rank."""
    vllm = ["rollout.engine=vllm", "policy.context=200"]
    second = small(*SECOND, *vllm)
    with SharedParts() as parts:
        train(small(*FIRST, *vllm), tmp_path / "1", console=QUIET, shared=parts)
        run, printed = train_printing(second, tmp_path / "2", parts)
        assert KEPT in printed
    assert results(run) == results(train(second, tmp_path / "alone", console=QUIET))


class TestParts:
    @pytest.fixture
    def parts(self):
        with SharedParts() as parts:
            yield parts

    @staticmethod
    def begin(parts, settings=None, rollout=ENGINE):
        policy = parts.load_policy(settings or PolicySettings(), 0, rollout)
        return policy, parts.start_engine(rollout, policy, Path())

    def reused(self, parts, settings=None):
        self.begin(parts, settings)
        return "base: of the run before" in parts.about

    def test_a_new_policy_is_as_after_loading(self, parts):
        """Flags and attributes of all modules, initial weights, and scores."""
        policy, _ = self.begin(parts, PolicySettings(lora={"rank": 4, "dropout": 0.5}))
        ids = torch.arange(2, 30)[None]
        policy.model.train()
        policy.model(input_ids=ids).logits.sum().backward()
        parts.keep()
        settings = PolicySettings(gradient_checkpointing=False)
        policy, fresh = parts.load_policy(settings, 7, ENGINE), load_policy(settings, 7)

        def described(model):
            plain = (bool, int, float, str, type(None))
            flags = {
                (name, key): value
                for name, module in model.named_modules()
                for key, value in vars(module).items()
                if isinstance(value, plain) and key != "compute_type_is_set"
                # False is the value of the class, too.
                if (key, value) != ("gradient_checkpointing", False)
            }
            parameters = {
                name: (p.dtype, p.requires_grad, p.grad, p.tolist())
                for name, p in model.named_parameters()
            }
            return (
                flags,
                parameters,
                model.config.to_dict(),
                model.config._attn_implementation,
            )

        assert described(policy.model) == described(fresh.model)
        with torch.no_grad():
            scores = [each.model(input_ids=ids).logits for each in (policy, fresh)]
        assert torch.equal(*scores)

    @pytest.mark.parametrize("part", ["weight", "buffer", "hook"])
    def test_a_base_that_was_changed_is_loaded_again(self, parts, part):
        policy, _ = self.begin(parts)
        base = policy.model.get_base_model()
        layer = base.model.layers[1]
        if part == "weight":
            layer.mlp.up_proj.base_layer.weight.data[3] ^= 1
        elif part == "buffer":
            base.model.rotary_emb.inv_freq[-1] *= 2
        else:
            layer.register_forward_hook(lambda *_: None)
        parts.keep()
        assert not self.reused(parts)

    def test_the_base_of_a_run_that_failed_is_loaded_again(self, parts):
        self.begin(parts)  # And no `keep`.
        assert not self.reused(parts)
        parts.keep()
        assert self.reused(parts)

    def test_another_base_is_loaded(self, parts):
        self.begin(parts)
        parts.keep()
        assert not self.reused(parts, PolicySettings(quantization="none"))

    def test_every_setting_counts_that_is_not_applied_anew(self):
        first = PolicySettings(adapter="a").loading_inputs
        assert first == PolicySettings(
            adapter="b", reference="adapter", context=64, gradient_checkpointing=2,
            offload_checkpoints=True, layout="packed", fused_head=False, lora={"rank": 3},
        ).loading_inputs  # fmt: skip
        for changed in (
            {"model": "m"}, {"revision": "r"}, {"quantization": "int8"}, {"device": "cpu"},
            {"double_quantization": False}, {"dtype": "bfloat16"}, {"attention": "eager"},
            {"threads": 1}, {"offload_embedding": True}, {"trust_remote_code": True},
        ):  # fmt: skip
            assert PolicySettings(**changed).loading_inputs != first

    def test_memory_is_planned_as_for_the_first_run(self, parts):
        found = iter([(9, 9), (5, 9), (4, 9)])
        assert parts.free_memory(lambda: next(found)) == (9, 9)
        self.begin(parts)
        parts.keep()
        assert parts.free_memory(lambda: next(found)) == (9, 9)
        parts.close()
        assert parts.free_memory(lambda: next(found)) == (5, 9)

    def test_twenty_policies_leave_nothing(self, parts):
        counts = {}
        for number in range(1, 21):
            policy, _ = self.begin(parts)
            optimizer = torch.optim.AdamW(policy.parameters().values())
            policy.model(input_ids=torch.arange(2, 8)[None]).logits.sum().backward()
            optimizer.step()
            parts.keep()
            del policy, optimizer
            if number in (1, 20):
                counts[number] = live()
        assert counts[20] == counts[1]


class Stubborn(TransformersEngine):
    """An engine that can be taken over, and goes on serving the adapter of the first run."""

    closed = 0
    sticks = False

    def take_over(self, settings, policy):
        self._policy, self._serves_base = policy, True
        return True

    def score(self, prompt_ids, token_ids):
        gap = 1e-6 if self.sticks else 0.0
        return [each + gap for each in super().score(prompt_ids, token_ids)]

    def close(self):
        type(self).closed += 1


class TestEngine:
    @pytest.mark.parametrize("sticks", [False, True])
    def test_one_that_does_not_serve_the_base_is_started_again(self, sticks, monkeypatch):
        monkeypatch.setattr(Stubborn, "closed", 0)
        settings = RolloutSettings(engine=f"{__name__}:Stubborn")
        with SharedParts() as parts:
            _, engine = TestParts.begin(parts, rollout=settings)
            parts.keep()
            engine.sticks = sticks
            _, other = TestParts.begin(parts, rollout=settings)
            assert (other is engine) == (not sticks)
            assert Stubborn.closed == sticks
            assert (KEPT in parts.about) == (not sticks)

    def test_what_vllm_starts_with(self, lab_policy):
        """Ranks up to vLLM's next size are alike, as are sizes that follow from free memory."""

        def inputs(rollout=None, **policy):
            settings = lab_policy.settings.model_copy(update=policy)
            lab_policy.settings = settings
            lab_policy.context = settings.context or 512
            return start_inputs(RolloutSettings(**(rollout or {})), lab_policy)

        def rank(number):
            return lab_policy.settings.lora.model_copy(update={"rank": number})

        first = inputs(lora=rank(5))
        assert first == inputs(lora=rank(8))
        assert first == inputs({"temperature": 0.5, "max_tokens": 7, "probe_limit": 1.0})
        others = [
            inputs({"batch_size": 4}),
            inputs({"dtype": "float16"}),
            inputs({"base": "original"}),
            inputs({"kv_cache_mib": 64}),
            inputs({"gpu_memory": 0.5}),
            inputs(context=64),
            inputs(lora=rank(9)),
            inputs(model="elsewhere"),
        ]
        assert all(each != first for each in others)
