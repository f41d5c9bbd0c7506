"""Plans of any model, for this machine, and the largest value of a field that fits."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from http.server import ThreadingHTTPServer

import pytest
from waiting import wait_until

from gft_lite.cli import main
from gft_lite.planning.gpus import own_machine, parse_size
from gft_lite.planning.hub_config import read_hub_file
from gft_lite.planning.memory import Batch, Choice, MemoryModel
from gft_lite.planning.model_shape import ModelShape, find_shape
from gft_lite.planning.planner import choose, plan_for, resolve
from gft_lite.planning.solve import find_quantity, solve
from gft_lite.recipe.schema import Recipe
from gft_lite.utils.errors import RecipeError, UserError
from gft_lite.utils.hub import why_offline
from gft_lite.utils.memory import GIB, LOGIT_CHUNK_BYTES
from tests.http_handler import JsonHandler

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
LLAMA = {"model_type": "llama", "intermediate_size": 128, **SIZES}
PAPER = {"policy": {"model": "Qwen/Qwen2.5-Math-1.5B", "context": 4096},
         "data": {"max_prompt_tokens": 1024}, "rollout": {"max_tokens": 2048},
         "train": {"micro_batch_tokens": "auto"}}  # fmt: skip


class TestEstimates:
    def test_another_family_is_taken_for_a_llama(self):
        known = ModelShape.from_config(LLAMA)
        shape = ModelShape.from_config(LLAMA | {"model_type": "olmo2"})
        assert replace(shape, assumptions=()) == known
        assert "no tested formulas for type 'olmo2'" in shape.assumptions[0]

    def test_sizes_have_many_names(self):
        gpt2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100,
                "n_positions": 1024, "tie_word_embeddings": True}  # fmt: skip
        shape = ModelShape.from_config(gpt2)
        assert (shape.hidden, shape.layers, shape.heads, shape.kv_heads) == (64, 2, 4, 4)
        assert (shape.mlp, shape.context, shape.tied) == (256, 1024, True)
        assert "an MLP four times as wide as the model, 256" in shape.assumptions
        assert ModelShape.from_config(gpt2 | {"multi_query": True}).kv_heads == 1

    def test_experts_that_a_token_does_not_use_are_plain_parameters(self):
        moe = LLAMA | {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2,
                       "moe_intermediate_size": 32}  # fmt: skip
        shape = ModelShape.from_config(moe)
        assert shape.mlp == 2 * 32
        llama = ModelShape.from_config(LLAMA | {"intermediate_size": 64})
        assert shape.plain_parameters - llama.plain_parameters == 2 * 3 * 64 * 32 * 6
        assert any("2 of 8 experts compute a token" in text for text in shape.assumptions)
        for shared in ({"shared_expert_intermediate_size": 48}, {"n_shared_experts": 2}):
            width = shared.get("shared_expert_intermediate_size", 2 * 32)
            assert ModelShape.from_config(moe | shared).mlp == 2 * 32 + width

    def test_of_a_multimodal_model_the_text_decoder_is_planned(self):
        shape = ModelShape.from_config({"model_type": "llava", "text_config": LLAMA})
        assert (shape.hidden, shape.mlp) == (64, 128)
        assert any("only text_config is counted" in text for text in shape.assumptions)
        assert not shape.tied
        outer = {"model_type": "llava", "text_config": LLAMA, "tie_word_embeddings": True}
        assert ModelShape.from_config(outer).tied

    def test_a_list_of_sizes_counts_as_its_largest(self):
        shape = ModelShape.from_config(
            {**SIZES, "model_type": "openelm", "intermediate_size": [64, 256]}
        )
        assert shape.mlp == 256

    def test_a_model_without_attention_has_no_estimate(self):
        sizes = {k: v for k, v in SIZES.items() if k != "num_attention_heads"}
        with pytest.raises(RecipeError, match="'mamba' with num_attention_heads: null"):
            ModelShape.from_config(sizes | {"model_type": "mamba", "intermediate_size": 128})

    def test_the_plan_says_what_it_assumes_and_training_goes_on(self, tmp_path, capsys):
        config = LLAMA | {"model_type": "olmo2", "max_position_embeddings": 2048}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert main(["plan", "recipes/lab.yaml", f"policy.model={tmp_path}"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "an estimate: no tested formulas for type 'olmo2'" in out
        # An estimate that nothing fits does not end the run.
        tree = {"policy": {"model": str(tmp_path), "gradient_checkpointing": "auto"}}
        recipe, plan = resolve(Recipe.from_tree(tree), 1000, "cuda")
        assert plan.problems
        assert recipe.policy.gradient_checkpointing == 2


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch, tmp_path):
        """A local hub with one model; the paths that were requested."""
        requests: list[str] = []
        over = threading.Event()

        class Hub(JsonHandler):
            def do_GET(self) -> None:
                requests.append(self.path)
                if self.path == "/someone/model/resolve/main/config.json":
                    self.answer(200, json.dumps(LLAMA))
                elif self.path.startswith("/slow"):
                    over.wait()
                    self.answer(200, "{}")
                else:
                    self.answer(401, "{}")

        server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )  # fmt: skip
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield requests
        over.set()
        server.shutdown()
        server.server_close()

    def test_one_small_file_is_fetched(self, hub):
        assert find_shape("someone/model") == ModelShape.from_config(LLAMA)
        assert hub == ["/someone/model/resolve/main/config.json"]
        with pytest.raises(RecipeError, match="which the hub does not have"):
            find_shape("someone/model", "another")
        assert hub[1:] == ["/someone/model/resolve/another/config.json"]

    def test_an_unknown_model_is_one_line(self, hub):
        with pytest.raises(RecipeError, match=r"^policy\.model: .* got 'no/one', which the hub"):
            find_shape("no/one")
        assert len(hub) == 1  # Without tries again.

    def test_a_hub_that_does_not_answer_is_given_up(self, hub, monkeypatch):
        monkeypatch.setattr("gft_lite.utils.hub.TIMEOUT", 0.5)
        with pytest.raises(RecipeError, match=r"can't be reached \(timed out\)"):
            read_hub_file("slow/model", "config.json")
        wait_until(lambda: hub)  # Its thread may not have run yet.
        assert len(hub) == 1

    def test_without_a_reply_libraries_work_offline(self, hub, monkeypatch):
        from huggingface_hub import constants, is_offline_mode

        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setenv("HF_ENDPOINT", constants.ENDPOINT)
        why_offline.cache_clear()
        try:
            assert (why_offline(), is_offline_mode()) == (None, False)
            why_offline.cache_clear()
            monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
            with pytest.raises(
                RecipeError, match=r"not been downloaded, and http://127.0.0.1:1 can"
            ):
                find_shape("someone/model")
            assert is_offline_mode() and os.environ["HF_HUB_OFFLINE"] == "1"
            assert not hub  # No file was requested.
        finally:
            why_offline.cache_clear()

    def test_offline_only_the_cache_is_read(self, monkeypatch, tmp_path):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(RecipeError, match="has not been downloaded, and HF_HUB_OFFLINE is set"):
            find_shape("someone/cached")
        repo = tmp_path / "models--someone--cached"
        (repo / "snapshots" / "abc").mkdir(parents=True)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("abc")
        (repo / "snapshots" / "abc" / "config.json").write_text(json.dumps(LLAMA))
        assert read_hub_file("someone/cached", "config.json") == json.dumps(LLAMA).encode()


class TestThisMachine:
    def test_its_gpu_if_nvidia_smi_lists_one(self, tmp_path, monkeypatch):
        tool = tmp_path / "nvidia-smi"
        tool.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 4070, 12282'\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        machine = own_machine()
        assert (machine.name, machine.device) == ("NVIDIA GeForce RTX 4070", "cuda")
        assert machine.size == 12282 << 20
        plan = plan_for(Recipe.from_tree(PAPER), None)
        assert (plan.limit, plan.where, plan.model.device) == (12282 << 20, machine.name, "cuda")
        assert plan_for(Recipe.load("recipes/lab.yaml", ["policy.device=cpu"]), None).limit > GIB
        tool.write_text("#!/bin/sh\necho 'no devices were found'; exit 6\n")
        assert own_machine().device == "cpu"

    def test_else_its_ram(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        plan = plan_for(Recipe.load("recipes/lab.yaml"), None)
        assert plan.model.device == "cpu"
        memory = plan_for(Recipe.load("recipes/lab.yaml", ["train.memory=2GiB"]), None)
        assert memory.limit == 2 * GIB
        cards = plan_for(Recipe.load("recipes/lab.yaml", ["policy.device=cuda"]), None)
        assert (cards.model.device, cards.limit) == ("cuda", 8 * GIB)


class TestSolving:
    def model(self, **sections):
        recipe = Recipe.from_tree({n: PAPER.get(n, {}) | sections.get(n, {})
                                   for n in {*PAPER, *sections}})  # fmt: skip
        return MemoryModel(find_shape(recipe.policy.model), recipe, "cuda")

    @pytest.mark.parametrize(
        "field", ["rollout.max_tokens", "policy.lora.rank", "data.max_prompt_tokens"]
    )
    def test_one_more_does_not_fit(self, field):
        rollout = {"engine": "transformers", "batch_size": 8, "max_tokens": 512}
        model = self.model(rollout=rollout, policy={"gradient_checkpointing": 28})
        limit = int(2.8 * GIB)
        found = solve(model, limit, field)
        assert found.value > 1
        section, _, name = field.partition(".")

        def problems(value):
            tree = model.recipe.model_dump()
            at = tree[section]["lora"] if "." in name else tree[section]
            at[name.rpartition(".")[2]] = value
            changed = replace(model, recipe=Recipe.from_tree(tree))
            return choose(changed, limit).problems

        assert not problems(found.value)
        assert found.why == f"with {found.value + 1:,}, {' and '.join(problems(found.value + 1))}"

    def test_limits_other_than_memory(self):
        model, room = self.model(), 80 * GIB
        assert solve(model, room, "rollout.max_tokens").value == 4096 - 1024 - 1
        assert solve(model, room, "data.max_prompt_tokens").value == 4096 - 2048 - 1
        assert solve(model, room, "policy.lora.rank").value == 512
        assert "not memory" in solve(model, room, "group.size").why
        assert solve(model, GIB, "group.size").value == 0

    def test_names(self):
        recipe = Recipe()
        for short, field in (("K", "group.size"), ("rank", "policy.lora.rank"),
                             ("response", "rollout.max_tokens")):  # fmt: skip
            assert find_quantity(short, recipe) == field
        with pytest.raises(UserError, match=r"^--solve: must be one of .* Did you mean policy.lor"):
            find_quantity("rnak", recipe)
        with pytest.raises(UserError, match="with method sft, which samples no responses"):
            find_quantity("K", Recipe.from_tree({"method": "sft"}))

    def test_the_command(self, capsys):
        recipe = "recipes/qwen_math_1p5b.yaml"
        assert main(["plan", recipe, "--gpu", "3060", "--solve", "response"]) == 0
        out = capsys.readouterr().out
        assert "on rtx3060 with 12 GiB: rollout.max_tokens=" in out
        assert "rollout.batch_size=" in out
        assert main(["plan", recipe, "--gpu", "h100", "--solve", "rank", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["solution"]["policy.lora.rank"] == 512


def test_a_gpu_that_is_not_named_whole():
    with pytest.raises(UserError, match="Did you mean rtx4050, rtx4060"):
        parse_size("rtx40")


def test_the_gradient_of_the_entropy_takes_whole_rows_of_logits():
    recipe = Recipe.from_tree(PAPER | {"objective": {"entropy": 0.01}})
    model = MemoryModel(find_shape(recipe.policy.model), recipe, "cuda")
    words = model.shape.vocabulary
    logits = 4 * words * (LOGIT_CHUNK_BYTES // (4 * words))
    assert model.head(Batch(4096, 4096, 4096)) == 3 * logits


def test_a_server_of_a_run_on_a_cpu_has_the_libraries_a_second_time():
    model = MemoryModel(find_shape("lab"), Recipe.load("recipes/lab.yaml"), "cpu", 8 * GIB)
    own, server = (model.engine(Choice(64, 0, False, False, engine, 4))["engine"]
                   for engine in ("vllm", "vllm_server"))  # fmt: skip
    assert server - own > 0.4 * GIB
