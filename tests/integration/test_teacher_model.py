"""Teachers on the policy's own samples: their log-probs, prompts and weights by hand."""

from __future__ import annotations

import pytest
import torch
import transformers

from gft_lite import lab
from gft_lite.data.prompts import PromptFormat
from gft_lite.policy.batching import Row
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import DataSettings
from gft_lite.training.learner import Learner
from gft_lite.training.teacher_model import TeacherModel
from gft_lite.types import Problem
from gft_lite.utils.errors import RecipeError


def moved(policy, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return weights(policy)


def weights(policy):
    return {name: p.detach().clone() for name, p in policy.parameters().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def policy(lab_policy):
    moved(lab_policy, 7)
    return lab_policy


@pytest.fixture
def problems(policy):
    """The lab's problems, as the run has them."""
    encode = policy.tokenizer.encode
    return [
        Problem(row["id"] if "id" in row else str(i), row["problem"], row["answer"],
                prompt_ids=tuple(encode(row["problem"])), experts=tuple(row["expert"]))
        for i, row in enumerate(lab.rows("train", limit=3))
    ]  # fmt: skip


def rows(problems, length=6):
    return [Row(p.prompt_ids, tuple(range(50, 50 + length + i))) for i, p in enumerate(problems)]


def made(policy, method="sdft", **settings):
    tree = {"method": method, "teacher": settings, "rollout": {"max_tokens": 16}}
    format = PromptFormat(policy.tokenizer, DataSettings().prompt)
    return TeacherModel(policy, Recipe.from_tree(tree), format, sees_demonstration=method == "sdft")


def plain_logprobs(model, prompt_ids, response_ids):
    """The response's log-probs after a prompt, from the model's full logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt_ids, *response_ids]])).logits[0].float()
    log = logits[len(prompt_ids) - 1 : -1].log_softmax(-1)
    return log.gather(-1, torch.tensor(response_ids)[:, None])[:, 0]


def taught(teacher, problems, budget=60):
    """The teacher's log-probs of some rows; its model and mode stay as they were."""
    training = teacher.policy.model.training
    found = [row.loss_inputs["teacher_logprobs"] for row in teacher.score(rows(problems), budget)]
    assert teacher.policy.model.training == training
    return found


def near(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


TEMPLATE = "{problem} like {demonstration} then"


def shown(policy, problem):
    text = TEMPLATE.replace("{problem}", problem.text)
    text = text.replace("{demonstration}", problem.experts[0])
    return policy.tokenizer.encode(text)


def test_the_base_is_shown_the_demonstration(policy, problems):
    teacher, before = made(policy, model="base", template=TEMPLATE), weights(policy)
    assert teacher.usable(problems) == tuple(problems)
    with policy.model.disable_adapter():
        expected = [plain_logprobs(policy.model, shown(policy, p), r.response_ids)
                    for p, r in zip(problems, rows(problems), strict=True)]  # fmt: skip
    near(taught(teacher, problems), expected)
    assert same(weights(policy), before)
    assert teacher.state == {}


def test_a_template_is_filled_in_once(policy, problems):
    """A problem that holds the name of a place keeps it."""
    odd = Problem("odd", "1+1 {demonstration}", "2", prompt_ids=(5, 6, 7), experts=("{problem}",))
    teacher = made(policy, model="base", template="{problem};{demonstration}")
    assert teacher.usable([odd]) == (odd,)
    with policy.model.disable_adapter():
        prompt = policy.tokenizer.encode("1+1 {demonstration};{problem}")
        expected = plain_logprobs(policy.model, prompt, rows([odd])[0].response_ids)
    near(taught(teacher, [odd]), [expected])


def test_an_average_follows_the_updates_and_scores_as_its_weights(policy, problems):
    teacher, first = made(policy, model="average", decay=0.75, template=TEMPLATE), weights(policy)
    teacher.usable(problems)
    second = moved(policy, 8)
    assert same(teacher.state, first)
    teacher.follow()
    expected = {name: 0.75 * first[name] + 0.25 * second[name] for name in first}
    for name, value in teacher.state.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    found = taught(teacher, problems)
    assert same(weights(policy), second)
    with torch.no_grad():
        for name, parameter in policy.parameters().items():
            parameter.copy_(expected[name])
    near(found, [plain_logprobs(policy.model, shown(policy, p), r.response_ids)
                 for p, r in zip(problems, rows(problems), strict=True)])  # fmt: skip


def test_the_state_of_an_average_is_restored(policy):
    teacher, other = made(policy, model="average"), made(policy, model="average")
    moved(policy, 8)
    teacher.follow()
    assert not same(teacher.state, other.state)
    other.load_state(teacher.state)
    assert same(teacher.state, other.state)


def test_an_average_follows_after_each_finite_update(policy, problems):
    recipe = Recipe.from_tree({"method": "sdft", "optim": {"lr": 1e-2, "warmup": 0}})
    teacher = made(policy, model="average", decay=0.5, template=TEMPLATE)
    teacher.usable(problems)
    learner, before = Learner(policy, recipe, teacher=teacher), weights(policy)
    prepared = learner.prepare_rows(rows(problems))
    assert learner.update(prepared, 0.0).skipped is None
    after = weights(policy)
    assert not same(after, before)
    for name, value in teacher.state.items():
        torch.testing.assert_close(value, (before[name] + after[name]) / 2)


def test_an_adapter_teaches_and_the_policy_keeps_its_own(policy, problems, tmp_path):
    folder, theirs = policy.save_adapter(tmp_path / "teacher"), weights(policy)
    own = moved(policy, 8)
    teacher = made(policy, "opd", model=str(folder))
    assert same(weights(policy), own)
    teacher.usable(problems)
    found = taught(teacher, problems)
    assert same(weights(policy), own)
    teacher.follow()  # Nothing but an average does.
    assert teacher.state == {}
    with torch.no_grad():
        for name, parameter in policy.parameters().items():
            parameter.copy_(theirs[name])
    # opd's teacher has the policy's own prompt.
    near(found, [plain_logprobs(policy.model, r.prompt_ids, r.response_ids)
                 for r in rows(problems)])  # fmt: skip


def model_folder(path, *, words=(), scale=1.0):
    """The lab's base as another model, with more tokens if `words` are given."""
    model = transformers.AutoModelForCausalLM.from_pretrained(lab.BASE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(lab.BASE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    if words:
        tokenizer.add_tokens(list(words))
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_another_model_teaches(policy, problems, tmp_path):
    folder = model_folder(tmp_path / "model", scale=0.8)
    policy.settings = policy.settings.model_copy(update={"quantization": "none"})
    recipe = Recipe.from_tree({
        "method": "opd", "policy": {"quantization": "none", "gradient_checkpointing": False},
        "teacher": {"model": str(folder)}, "rollout": {"max_tokens": 16},
    })  # fmt: skip
    teacher = TeacherModel(policy, recipe, PromptFormat(policy.tokenizer, DataSettings().prompt),
                           sees_demonstration=False)  # fmt: skip
    teacher.usable(problems)
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    near(taught(teacher, problems), [plain_logprobs(other, r.prompt_ids, r.response_ids)
                                     for r in rows(problems)])  # fmt: skip


def test_teachers_that_do_not_fit(policy, problems, tmp_path):
    with pytest.raises(RecipeError, match=r"^teacher.model: must have the tokenizer of .* lab"):
        made(policy, "opd", model=str(model_folder(tmp_path / "words", words=["wort"])))
    with pytest.raises(RecipeError, match=r"^teacher\.model: "):
        made(policy, "opd", model=str(tmp_path / "nowhere"))
    folder = policy.save_adapter(tmp_path / "adapter")
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 16', '"r": 8'))
    with pytest.raises(RecipeError, match=r"^teacher.model: must have the rank and alpha .* 16"):
        made(policy, "opd", model=str(folder))
    long = "{problem}" + "1+" * policy.context + "{demonstration}"
    with pytest.raises(RecipeError, match=r"^teacher.template: must leave room .* none of 3"):
        made(policy, model="base", template=long).usable(problems)


def test_problems_without_room_are_left_out(policy, problems):
    room = policy.context - 17  # 16 tokens of a response and one that an engine generates.
    odd = Problem("long", problems[0].text, "1", prompt_ids=(9, 9), experts=("1" * room,))
    assert made(policy, model="base").usable([*problems, odd]) == tuple(problems)


@pytest.mark.parametrize("template", ["{problem}", "{demonstration}", ""])
def test_a_template_must_have_both(template):
    with pytest.raises(RecipeError, match=r"^teacher.template: must contain \{"):
        Recipe.from_tree({"method": "sdft", "teacher": {"template": template}})


@pytest.mark.parametrize("model", ["base", "average"])
def test_opd_needs_another_teacher(model):
    with pytest.raises(RecipeError, match=r"^teacher.model: must be another .* method opd, got '"):
        Recipe.from_tree({"method": "opd", "teacher": {"model": model}})
