"""The memory plan's formulas against values worked out by hand, and what it chooses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gft_lite.cli import main
from gft_lite.planning.gpus import parse_size
from gft_lite.planning.memory import Batch, Choice, MemoryModel
from gft_lite.planning.model_shape import ModelShape, find_shape
from gft_lite.planning.planner import CARDS, choose, resolve, what_would_fit, with_auto
from gft_lite.recipe.schema import Recipe
from gft_lite.utils.errors import RecipeError, UserError
from gft_lite.utils.memory import GIB, free_ram

ROOT = Path(__file__).resolve().parents[2]
MODELS = [  # The paper's.
    "Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Math-7B", "meta-llama/Llama-3.2-3B",
    "meta-llama/Llama-3.1-8B", "deepseek-ai/deepseek-math-7b-base",
]  # fmt: skip
QWEN_7B = MODELS[1]
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
MIB = 1 << 20
PAPER = {
    "policy": {"context": 4096},
    "data": {"max_prompt_tokens": 1024},
    "rollout": {"max_tokens": 2048},
}


def memory_model(model=QWEN_7B, *, device="cuda", **sections):
    recipe = Recipe.from_tree(
        {name: PAPER.get(name, {}) | sections.get(name, {}) for name in {*PAPER, *sections}}
    )
    return MemoryModel(find_shape(model), recipe, device)


def total(parts):
    return sum(parts.values())


class TestFormulas:
    @pytest.mark.parametrize(
        ("model", "parameters", "base", "lora_and_adamw"),
        [
            # Parameters as published; GiB of the NF4 base; GiB of r = 16 at 16 bytes each.
            (MODELS[0], 1_543_714_304, 1.06, 0.28),
            (MODELS[1], 7_615_616_512, 5.17, 0.60),
            (MODELS[2], 3_212_749_824, 2.09, 0.36),
            (MODELS[3], 8_030_261_248, 5.31, 0.62),
            (MODELS[4], 6_910_365_696, 4.48, 0.56),
        ],
    )
    def test_the_papers_models(self, model, parameters, base, lora_and_adamw):
        planned = memory_model(model, optim={"name": "adamw"})
        shape = planned.shape
        assert shape.linear_parameters + shape.plain_parameters == parameters
        assert round(planned.base(False) / GIB, 2) == base
        adapter = 4 * planned.lora_parameters + planned.optimizer(gradients=True)
        assert round(adapter / GIB, 2) == lora_and_adamw

    def test_a_layer_keeps_what_its_tensors_add_up_to(self):
        # In bf16, per token: two norms (4 x 3584 + 4 each, fp32), their outputs, query and
        # attention output (3584 each, as hidden), four of the MLP (18944), 7 x 16 of LoRA, 28
        # log-sums; and keys and values (512 each).
        per_token = 2 * (4 * 3584 + 4) + 2 * (2 * 3584 + 2 * 3584 + 4 * 18944 + 7 * 16) + 4 * 28
        assert (
            memory_model().saved_activations(Batch(1000, 900, 3000))
            == 1000 * per_token + 3000 * 2 * 2 * 512
        )

    def test_keys_and_values_of_a_token(self):
        assert memory_model().kv_per_token == 2 * 28 * 4 * 128 * 2
        assert memory_model(device="cpu").kv_per_token == 2 * 28 * 4 * 128 * 4

    def test_quantisations_of_the_base(self):
        linear, plain = 28 * 233_046_016, 2 * 152_064 * 3584 + 57 * 3584 + 28 * 4608
        outputs = 28 * (3584 + 512 + 512 + 3584 + 18944 + 18944 + 3584)

        def base(**policy):
            return memory_model(policy=policy).base(False)

        assert base(quantization="none") == 2 * (linear + plain)
        assert base(quantization="int8") == linear + 4 * outputs + 2 * plain
        single = base(double_quantization=False)
        assert single == linear // 2 + linear // 16 + 2 * plain

    def test_an_untied_embedding_can_leave_the_card(self):
        assert memory_model().base(False) - memory_model().base(True) == 2 * 152_064 * 3584
        tied = memory_model(MODELS[0])
        assert tied.base(False) == tied.base(True)

    def test_only_the_named_linears_are_adapted(self):
        lora = {"rank": 8, "target_modules": ["q_proj", "v_proj"]}
        adapted = memory_model(policy={"lora": lora})
        assert adapted.lora_parameters == 28 * 8 * ((3584 + 3584) + (3584 + 512))

    def test_checkpoints_are_the_layers_inputs(self):
        batch = Batch(3072, 3072, 3072)
        moment = memory_model().peak_candidates(Choice(0, 28, False, False, "none", 1), batch)[
            "layer"
        ]
        assert moment["checkpoints"] == 28 * 3072 * 3584 * 2
        away = memory_model().peak_candidates(Choice(0, 28, True, False, "none", 1), batch)["layer"]
        assert away["checkpoints"] == 2 * 3072 * 3584 * 2

    def test_vllm_takes_its_share_in_both_phases(self):
        planned = replace(memory_model(rollout={"sleep": False, "max_tokens": 2048}), card=48 * GIB)
        choice = Choice(4096, 28, False, False, "vllm", 128, 0.5)
        for parts in (planned.training(choice), planned.rollout(choice)):
            assert parts["engine"] + parts["kv_cache"] == 24 * GIB
        # Its bf16 copy of the base alone.
        assert parts["engine"] > 2 * 7_615_616_512

    def test_vllm_that_sleeps_leaves_the_card_to_training(self):
        planned = replace(memory_model(rollout={"eager": True, "max_tokens": 2048}), card=48 * GIB)
        choice = Choice(4096, 28, False, False, "vllm", 128, 0.5)
        graphs = replace(planned, recipe=memory_model(rollout={"eager": False}).recipe)
        bare = planned.training(replace(choice, engine="none"))
        # Estimates: 0.3 GiB of buffers, and 0.6 GiB of CUDA graphs.
        for each, kept in ((planned, 0.3), (graphs, 0.9)):
            parts = each.training(choice)
            assert parts["engine"] == pytest.approx(kept * GIB, abs=2)
            assert total(parts) == total(bare) + parts["engine"]
        rollout = planned.rollout(choice)
        assert rollout["engine"] + rollout["kv_cache"] == 24 * GIB
        # What torch counts, and where the weights are meanwhile.
        plan = choose(memory_model(rollout={"gpu_memory": 0.5, "engine": "vllm"}), 48 * GIB)
        own = sum(plan.training[name] for name in ("base", "lora", "optimiser", "checkpoints",
                                                   "activations", "head"))  # fmt: skip
        assert plan.predicted_peak == own + 24 * GIB
        assert planned.engine_weights == 2 * 7_615_616_512

    def test_a_server_beside_the_trainer_needs_room_and_one_elsewhere_none(self):
        own = replace(
            memory_model(rollout={"engine": "vllm_server", "max_tokens": 2048}), card=48 * GIB
        )
        choice = Choice(4096, 28, False, False, "vllm_server", 128, 0.5)
        rollout = own.rollout(choice)
        assert rollout["engine"] + rollout["kv_cache"] == 24 * GIB
        inside = own.rollout(replace(choice, engine="vllm"))
        # A process of its own has a CUDA context of its own, which is taken to be 0.6 GiB.
        assert rollout["engine"] - inside["engine"] == int(0.6 * GIB)
        rollout = {"engine": "vllm_server", "servers": "http://elsewhere"}
        assert "engine" not in memory_model(rollout=rollout).rollout(choice)

    def test_the_plugin_has_the_trainers_nf4(self):
        plugin = memory_model(rollout={"base": "plugin"})
        assert plugin.engine_weights == plugin.base(False)

    def test_on_a_cpu_a_process_is_more_than_its_tensors(self):
        own = {"dtype": "bfloat16", "context": 1024}
        rollout = {"engine": "vllm", "max_tokens": 256, "dtype": "float32", "kv_cache_mib": 64}
        planned = memory_model(SMOLLM2, device="cpu", policy=own, rollout=rollout)
        choice = Choice(2048, 30, False, False, "vllm", 32)
        batch = Batch(2048, 2048, 2048)
        parts = planned.training(choice, batch)
        # Layers: 2 x 576^2 + 2 x 576 x 192 + 3 x 576 x 1536 weights in 7 linears; 49,152 tokens.
        linear = 30 * 3_538_944
        assert parts["process"] == 530 * MIB + 950 * 49_152
        assert parts["file"] == 2 * linear  # NF4 beside a file in the policy's own precision.
        # fp32 weights, embedding and head packed a second time, vLLM and its tokenizers.
        plain = 134_515_008 - linear
        assert parts["engine"] == (
            4 * (linear + plain) + 2 * 4 * 49_152 * 576 + 152 * MIB + 3000 * 49_152
        )
        assert parts["kv_cache"] == 64 * MIB
        # Holes beside what each of the 30 layers saves, although they are recomputed.
        saved = planned.saved_activations(batch)
        assert parts["fragmentation"] == int(1.1 * 30 * saved)
        loading = planned.loading(choice)
        assert loading["file"] == 2 * 134_515_008
        assert loading["fragmentation"] == int(1.3 * 2 * linear)
        on_gpu = memory_model(SMOLLM2, policy=own)
        assert not {"process", "file"} & on_gpu.training(choice, batch).keys()
        assert on_gpu.loading(choice) == {}
        plain = memory_model(SMOLLM2, device="cpu", policy=own | {"quantization": "none"})
        assert plain.training(choice, batch)["file"] == 0
        assert plain.training(choice, batch)["fragmentation"] == int(1.1 * 30 * saved)

    def test_blocks_above_32_mib_leave_no_holes_in_the_heap(self):
        planned = memory_model(
            SMOLLM2, device="cpu", policy={"context": 1024, "quantization": "none"}
        )
        choice = Choice(0, 30, False, False, "none", 1)

        def holes(tokens):
            batch = Batch(tokens, tokens, tokens)
            found = planned.training(choice, batch)["fragmentation"]
            return found, planned.saved_activations(batch)

        # A token has 4 x 1536 bytes in an activation of the MLP: 32 MiB at 5,461.3 tokens.
        found, saved = holes(5461)
        assert found == int(1.1 * 30 * saved)
        found, saved = holes(5462)
        assert found == int(1.1 * 30 * (saved - 4 * 4 * 1536 * 5462))
        assert holes(14_600)[0] == 0  # Even the hidden states: 4 x 576 bytes.

    def test_the_longest_row_ends_at_the_context(self):
        assert memory_model().longest_row == 3072
        assert memory_model(rollout={"max_tokens": 3500}).longest_row == 4095
        assert memory_model(data={"max_prompt_tokens": None}).prompt == 4096 - 2048 - 1


class TestShapes:
    def test_a_folder_a_file_and_the_lab(self, tmp_path):
        config = ROOT / "gft_lite" / "lab" / "base" / "config.json"
        (tmp_path / "config.json").write_bytes(config.read_bytes())
        lab = find_shape("lab")
        assert lab == find_shape(str(tmp_path)) == find_shape(str(config))
        assert (lab.hidden, lab.layers, lab.vocabulary, lab.tied) == (128, 3, 261, True)
        from safetensors import safe_open

        with safe_open(config.with_name("model.safetensors"), "np") as weights:
            sizes = [weights.get_tensor(name).size for name in weights.keys()]  # noqa: SIM118
        assert lab.linear_parameters + lab.plain_parameters == sum(sizes)

    @pytest.mark.parametrize(
        ("model", "parameters", "context"),
        [
            # Parameters as the hub counts them; of Qwen3 0.6B and 1.7B, whose files hold the tied
            # output head again, without it.
            ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, 8192),
            ("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120, 8192),
            ("HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384, 8192),
            ("HuggingFaceTB/SmolLM3-3B", 3_075_098_624, 65_536),
            ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768, 32_768),
            ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304, 32_768),
            ("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688, 32_768),
            ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512, 32_768),
            ("Qwen/Qwen3-0.6B", 751_632_384 - 151_936 * 1024, 40_960),
            ("Qwen/Qwen3-1.7B", 2_031_739_904 - 151_936 * 2048, 40_960),
            ("Qwen/Qwen3-4B", 4_022_468_096, 40_960),
            ("Qwen/Qwen3-8B", 8_190_735_360, 40_960),
            ("meta-llama/Llama-3.2-1B", 1_235_814_400, 131_072),
            ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, 131_072),
            ("google/gemma-3-1b-it", 999_885_952, 32_768),
            ("google/gemma-3-4b-it", 4_300_079_472, 131_072),
            ("microsoft/Phi-4-mini-instruct", 3_836_021_760, 4096),
        ],
    )
    def test_todays_models(self, model, parameters, context):
        shape = find_shape(model)
        assert shape.linear_parameters + shape.plain_parameters == parameters
        assert shape.context == context
        fragment = f"configs/models/{model.rpartition('/')[2].lower()}.yaml"
        recipe = Recipe.load(ROOT / fragment)
        assert recipe.policy.model == model
        assert recipe.policy.context <= context

    def test_the_planner_adapts_fused_linears_and_no_vision_tower(self):
        phi = memory_model("microsoft/Phi-4-mini-instruct")
        # Query, key and value from 3,072 to 24 + 2 x 8 heads of 128; gate and up to 2 x 8,192.
        outputs = (3072 + 5120) + (3072 + 3072) + (3072 + 16_384) + (8192 + 3072)
        assert phi.lora_parameters == 16 * 32 * outputs
        gemma = memory_model("google/gemma-3-4b-it")
        sizes = 2560 + 2048 + 2 * (2560 + 1024) + (2048 + 2560) + 3 * (2560 + 10_240)
        assert gemma.lora_parameters == 16 * 34 * sizes

    def test_head_sizes_and_kv_heads_have_defaults(self):
        shape = ModelShape.from_config(
            {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1024,
             "num_attention_heads": 8, "num_hidden_layers": 2, "vocab_size": 100}
        )  # fmt: skip
        assert (shape.head_size, shape.kv_heads, shape.tied) == (64, 8, False)

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"model_type": "mamba"}, "'mamba'"),
            ({}, "null"),
            ({"model_type": "llama", "hidden_size": 8}, "intermediate_size: null"),
            ([], "object"),
        ],
    )
    def test_a_config_without_formulas_is_an_error(self, config, words, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(RecipeError, match=words):
            find_shape(str(tmp_path))

    @pytest.mark.parametrize(
        ("key", "value"),
        [("num_attention_heads", 0), ("hidden_size", -8), ("vocab_size", True),
         ("vocab_size", 10**12), ("num_hidden_layers", 10**6), ("intermediate_size", "16"),
         ("num_key_value_heads", "2"), ("head_dim", 1.5), ("max_position_embeddings", "long"),
         ("max_position_embeddings", -1)],
    )  # fmt: skip
    def test_impossible_sizes_are_an_error(self, key, value, tmp_path):
        config = json.loads((ROOT / "gft_lite" / "lab" / "base" / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(RecipeError, match=rf"policy\.model: must be .* with {key}: "):
            find_shape(str(tmp_path))

    def test_a_config_that_is_no_json_is_an_error(self, tmp_path):
        for text in ("[" * 100_000, "{", "\x00"):
            (tmp_path / "config.json").write_text(text)
            with pytest.raises(RecipeError, match=r"policy\.model: must be a readable config"):
                find_shape(str(tmp_path))

    @pytest.mark.parametrize("model", ["a" * 5000, "a\0b", "a/b/c", "../", "x" * 300 + "/y"])
    def test_a_name_that_is_no_model_is_an_error(self, model):
        with pytest.raises(RecipeError, match=r"^policy\.model: must be lab, a folder .*, got "):
            find_shape(model)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("24GB", 24 * 10**9), ("512MiB", 512 << 20), ("1.5 GiB", 3 << 29),
     ("rtx4090", 24 << 30), ("RTX 4090", 24 << 30), ("h200", 139 << 30), ("8", 8 << 30),
     ("12G", 12 * 10**9), ("4090", 24 << 30), ("NVIDIA GeForce RTX 4070 Ti SUPER", 16 << 30),
     ("A100-40GB", 39 << 30), ("RTX 4060 Laptop GPU", 8 << 30), ("h2", 139 << 30)],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["rtx4091", "4091", "rtx40", "8 apples", "GiB", "-8GiB", "nanGiB", ""]
)
def test_a_wrong_size_is_an_error(text):
    with pytest.raises(UserError, match="--gpu: must be a size"):
        parse_size(text)


@pytest.mark.parametrize(
    "text", ["0GiB", "0.0 MB", "0.0000001MiB", "9" * 400 + "GiB", "2000000GiB"]
)
def test_a_size_that_no_gpu_has_is_an_error(text):
    with pytest.raises(UserError, match=r"^--gpu: must be larger than 0 and at most 1048576 GiB, "):
        parse_size(text)


class TestChoosing:
    @pytest.mark.parametrize("model", MODELS)
    @pytest.mark.parametrize("card", CARDS)
    def test_what_is_chosen_fits(self, model, card):
        planned = memory_model(model)
        plan = choose(replace(planned, recipe=with_auto(planned.recipe)), card * GIB)
        assert not plan.problems
        assert plan.peak <= card * GIB
        assert plan.choice.micro_batch_tokens >= planned.longest_row

    def test_less_memory_means_recomputing_then_offloading(self):
        auto = {"gradient_checkpointing": "auto", "offload_checkpoints": "auto",
                "offload_embedding": "auto", "context": 4096}  # fmt: skip
        planned = memory_model(
            policy=auto, train={"micro_batch_tokens": 4096},
            rollout={"engine": "transformers", "batch_size": 1, "max_tokens": 2048},
        )  # fmt: skip
        stages = []
        for quarters in range(4 * 48, 0, -1):
            plan = choose(planned, quarters * GIB // 4)
            if plan.problems:
                break
            c = plan.choice
            stages.append((c.offload_checkpoints + c.offload_embedding, c.gradient_checkpointing))
        assert stages[0] == (0, 0)
        assert stages[-1] == (2, 28)
        assert {0, 1, 2} == {offloaded for offloaded, _ in stages}
        assert any(0 < layers < 28 for _, layers in stages)
        costs = [(4 + layers / 14) * (1 + offloaded / 100) for offloaded, layers in stages]
        assert costs == sorted(costs)

    def test_what_the_recipe_says_stays(self):
        fixed = {"gradient_checkpointing": 5, "offload_checkpoints": True, "context": 4096}
        planned = memory_model(policy=fixed, train={"micro_batch_tokens": 5000},
                      rollout={"engine": "vllm", "batch_size": 3, "max_tokens": 2048,
                               "gpu_memory": 0.5})  # fmt: skip
        plan = choose(planned, 80 * GIB)
        assert plan.choice == Choice(5000, 5, True, False, "vllm", 3, 0.5)
        assert plan.chosen == frozenset()

    def test_vllm_gets_what_the_trainer_leaves(self):
        plan = choose(memory_model(rollout={"engine": "vllm", "max_tokens": 2048}), 24 * GIB)
        share = plan.choice.gpu_memory
        assert share * 10_000 == pytest.approx(round(share * 10_000))
        assert plan.settings["rollout.gpu_memory"] == share
        # Rounded down to ten-thousandths of the card, all of it is used.
        assert 23.997 * GIB < total(plan.rollout) <= 24 * GIB

    def test_vllm_gets_no_more_than_its_rows_can_fill(self):
        plan = choose(memory_model(rollout={"engine": "vllm", "max_tokens": 2048}), 80 * GIB)
        # 128 rows of 3072 tokens; keys and values of a token in 28 layers with 4 heads of 128.
        whole = 128 * 3072 * 2 * 28 * 4 * 128 * 2
        assert whole - 0.0001 * 80 * GIB < plan.rollout["kv_cache"] <= whole
        few = choose(memory_model(rollout={"engine": "vllm", "batch_size": 8}), 80 * GIB)
        assert few.choice.gpu_memory < plan.choice.gpu_memory

    def test_vllm_that_never_sleeps_leaves_room_for_training(self):
        rollout = {"engine": "vllm", "max_tokens": 2048, "sleep": False}
        plan = choose(memory_model(rollout=rollout, train={"micro_batch_tokens": 4096}), 32 * GIB)
        assert not plan.problems
        assert 31.96 * GIB < total(plan.training) <= 32 * GIB
        assert total(plan.rollout) < total(plan.training)

    def test_a_row_longer_than_the_budget_counts_as_it_is(self):
        planned = memory_model(train={"micro_batch_tokens": 100})
        assert planned.batch(100).tokens == planned.longest_row

    def test_on_a_cpu_nothing_is_offloaded(self):
        planned = memory_model(MODELS[0], device="cpu")
        plan = choose(replace(planned, recipe=with_auto(planned.recipe)), 64 * GIB)
        c = plan.choice
        assert (c.offload_checkpoints, c.offload_embedding, c.engine) == (
            False,
            False,
            "transformers",
        )
        assert not plan.problems
        assert "context" not in plan.training

    def test_what_would_fit_does(self):
        file = "recipes/paper/qwen2.5-math-7b/gft.yaml"
        planned = MemoryModel(find_shape(QWEN_7B), Recipe.load(file), "cuda")
        for limit in (7 * GIB, 12 * GIB):
            assert choose(planned, limit).problems
            overrides = what_would_fit(planned, limit).split()
            fitting = replace(planned, recipe=Recipe.load(file, overrides))
            assert not choose(fitting, limit).problems
        assert what_would_fit(planned, GIB) == "a smaller model"


class TestResolving:
    AUTO: dict = {  # noqa: RUF012
        "policy": {"model": QWEN_7B, "gradient_checkpointing": "auto",
                   "offload_checkpoints": "auto", "offload_embedding": "auto"},
        "train": {"micro_batch_tokens": "auto"},
        "rollout": {"max_tokens": 1024},
        "data": {"max_prompt_tokens": 512},
    }  # fmt: skip

    def test_no_auto_is_left(self):
        recipe, plan = resolve(Recipe.from_tree(self.AUTO), 24 * GIB, "cuda")
        assert plan.chosen >= {"train.micro_batch_tokens", "policy.gradient_checkpointing"}
        assert recipe.train.micro_batch_tokens == plan.choice.micro_batch_tokens
        assert recipe.policy.gradient_checkpointing == plan.choice.gradient_checkpointing
        assert recipe.policy.offload_checkpoints is plan.choice.offload_checkpoints
        assert recipe.policy.offload_embedding is plan.choice.offload_embedding
        assert recipe.rollout.gpu_memory == plan.choice.gpu_memory > 0.5
        # A recipe like any other: it can be written and read back.
        assert Recipe.from_tree(recipe.model_dump()) == recipe

    def test_the_engine_is_settled_by_what_fits_and_what_is_installed(self, monkeypatch):
        small, plan = resolve(Recipe.from_tree(self.AUTO), 22 * GIB, "cuda")
        assert 0 < plan.predicted_peak < total(plan.training)
        large, _ = resolve(Recipe.from_tree(self.AUTO), 80 * GIB, "cuda")
        assert (small.rollout.engine, large.rollout.engine) == ("transformers", "vllm")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        without, _ = resolve(Recipe.from_tree(self.AUTO), 80 * GIB, "cuda")
        assert without.rollout.engine == "transformers"

    def test_a_recipe_without_auto_stays_and_is_planned(self):
        recipe = Recipe.load("recipes/lab.yaml", ["rollout.engine=transformers"])
        same, plan = resolve(recipe, GIB, "cpu")
        assert same == recipe
        assert plan.chosen == frozenset()
        unknown = Recipe.from_tree({"policy": {"model": "someone/else"}})
        assert resolve(unknown, GIB, "cpu") == (unknown, None)

    def test_memory_in_the_recipe_goes_before_what_is_free(self):
        tree = self.AUTO | {"train": {"micro_batch_tokens": "auto", "memory": "24GiB"}}
        recipe, plan = resolve(Recipe.from_tree(tree), 79 * GIB, "cuda", card=80 * GIB)
        assert plan.limit == 24 * GIB
        # vLLM takes its share of the whole card.
        engine = plan.rollout["engine"] + plan.rollout["kv_cache"]
        assert engine == int(recipe.rollout.gpu_memory * 80 * GIB)
        with pytest.raises(
            RecipeError, match=r"train\.memory: must be auto or a size such as 8GiB"
        ):
            Recipe.from_tree({"train": {"memory": "much"}})

    def test_a_share_of_the_card_that_does_not_fit_is_left_to_the_engine(self):
        tree = {"policy": {"model": QWEN_7B}, "rollout": {"engine": "vllm"}}
        recipe, plan = resolve(Recipe.from_tree(tree), 12 * GIB, "cuda", card=12 * GIB)
        assert plan.problems
        assert recipe.rollout.gpu_memory == "auto"

    def test_an_error_names_settings_that_would_fit(self):
        with pytest.raises(RecipeError) as error:
            resolve(Recipe.from_tree(self.AUTO), 6 * GIB, "cuda")
        text = str(error.value)
        assert "policy.gradient_checkpointing" in text
        assert "6.0 GiB" in text
        assert "rollout.batch_size=" in text

    def test_auto_with_an_unknown_model_is_the_default(self):
        auto = {"gradient_checkpointing": "auto", "offload_embedding": "auto"}
        tree = {"policy": {"model": "someone/else"} | auto, "train": {"micro_batch_tokens": "auto"}}
        recipe, plan = resolve(Recipe.from_tree(tree), GIB, "cpu")
        assert plan is None
        assert recipe == Recipe.from_tree({"policy": {"model": "someone/else"}})
        assert recipe.train.micro_batch_tokens == 8192

    def test_on_a_cpu_vllm_gets_the_cache_that_is_planned(self):
        tree = {"policy": {"model": MODELS[0], "context": 2048}, "data": {"max_prompt_tokens": 100},
                "rollout": {"engine": "vllm", "max_tokens": 156, "batch_size": 16,
                            "dtype": "bfloat16"}}  # fmt: skip
        recipe, plan = resolve(Recipe.from_tree(tree), 64 * GIB, "cpu")
        # 16 rows of 256 tokens in blocks of 32, and one block; a row of 2,048 tokens takes less.
        per_token = 2 * 28 * 2 * 128 * 2
        assert plan.rollout["kv_cache"] == (16 * 8 + 1) * 32 * per_token
        assert recipe.rollout.kv_cache_mib == 113  # 112.9 MiB
        fixed = Recipe.from_tree(tree | {"rollout": tree["rollout"] | {"kv_cache_mib": 300}})
        assert resolve(fixed, 64 * GIB, "cpu")[1].rollout["kv_cache"] == 300 << 20

    def test_free_ram_is_some_of_it(self):
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert 0 < free_ram() < whole


class TestCommand:
    def test_it_imports_no_torch(self):
        code = (
            "import sys; from gft_lite.cli import main; main(['plan', 'recipes/qwen_math_1p5b.yaml'"
            "]); print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
        )
        assert done.stdout.splitlines()[-1] == "[]", done.stderr
        for word in ("Qwen/Qwen2.5-Math-1.5B", "1,543.7M", "KV cache", "peak", "80 GiB"):
            assert word in done.stdout

    @pytest.mark.parametrize(
        ("card", "why"),
        [("24GiB", "what the trainer leaves"), ("80GiB", "its KV cache can hold all rows")],
    )
    def test_vllms_share_comes_with_its_reason(self, card, why, capsys):
        recipe = "recipes/paper/qwen2.5-math-7b/gft.yaml"
        assert main(["plan", recipe, "--gpu", card, "rollout.engine=vllm"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "rollout.gpu_memory" in text
        assert why in text
        # 7,615.6M parameters in bf16.
        assert "14.2 GiB wait in RAM" in text

    def test_json_holds_everything(self, capsys):
        assert main(["plan", "recipes/qwen_math_1p5b.yaml", "--gpu", "rtx4090", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["limit"] == 24 * GIB
        assert found["fits"] is True
        assert found["peak"] == max(total(found["training"]), total(found["rollout"]))
        assert found["settings"]["train.micro_batch_tokens"] >= 3072  # The longest row.
        assert [card["limit"] // GIB for card in found["cards"]] == list(CARDS)

    def test_what_does_not_fit_comes_with_what_would(self, capsys):
        recipe = "recipes/paper/qwen2.5-math-7b/gft.yaml"
        assert main(["plan", recipe, "--gpu", "8GiB"]) == 0
        out = capsys.readouterr().out
        assert "does not fit" in out
        assert "policy.offload_embedding=true" in out

    def test_wrong_input_is_exit_code_2(self, capsys):
        assert main(["plan", "recipes/lab.yaml", "--gpu", "rtx490"]) == 2
        assert "Did you mean rtx4090?" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "words",
        [["--gpu", "0GiB"], ["--gpu", "0GiB", "rollout.engine=vllm"], ["--gpu", "9" * 400 + "GB"],
         ["train.memory=0GiB"], ["train.memory=0.00 MB"]],
    )  # fmt: skip
    def test_a_size_that_no_gpu_has_is_exit_code_2(self, words, capsys):
        recipe = "recipes/qwen_math_1p5b.yaml"
        assert main(["plan", recipe, *words]) == 2
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)
        assert ("--gpu: must be" if words[0] == "--gpu" else "train.memory: must be") in err

    @pytest.mark.parametrize(
        "recipe", ["recipes/lab.yaml", *(f"recipes/paper/{m}/gft.yaml" for m in
                   ("llama-3.1-8b", "llama-3.2-3b", "deepseek-math-7b")),
                   *(f"recipes/real/{m}_gsm8k.yaml" for m in
                     ("smollm2_135m", "qwen2.5_0.5b", "qwen3_0.6b"))]
    )  # fmt: skip
    def test_shipped_recipes_can_be_planned(self, recipe, capsys):
        assert main(["plan", recipe]) == 0
        assert "what would fit" in capsys.readouterr().out

    @pytest.mark.parametrize("model", ["smollm2_135m", "qwen2.5_0.5b", "qwen3_0.6b"])
    def test_recipes_of_real_models_fit_an_8_gb_card_and_a_cpu(self, model, capsys):
        recipe = f"recipes/real/{model}_gsm8k.yaml"
        for words in (["--gpu", "8GiB"], ["--gpu", "16GiB", "policy.device=cpu"]):
            assert main(["plan", recipe, *words, "--json"]) == 0
            found = json.loads(capsys.readouterr().out)
            assert found["fits"], words
            assert bool(found["loading"]) == ("policy.device=cpu" in words)
            phases = [total(found[name]) for name in ("loading", "training", "rollout")]
            assert found["peak"] == max(phases)
