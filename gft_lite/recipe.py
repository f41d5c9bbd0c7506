"""The recipe: one typed schema, `extends:`, `key=value` overrides, and errors one can act on.

Nothing heavy is imported here, so that `--help`, `--dry-run` and a recipe error answer at once.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from gft_lite.objective import METHODS

PACKAGE = Path(__file__).resolve().parent


def _named_in(table: str) -> AfterValidator:
    """A name must stand in `table` ("module:NAME"), or be a dotted path to the user's own.

    The table stays in the room that owns it and is read only when a recipe is checked.
    """

    def check(name: str) -> str:
        module, attribute = table.split(":")
        known = getattr(importlib.import_module(module), attribute)
        if name in known or re.fullmatch(r"[A-Za-z_][\w.]*[.:][A-Za-z_]\w*", name):
            return name
        raise ValueError(
            f"must be one of {', '.join(sorted(known))}, or a dotted path"
            + _nearest(name, known)
        )

    return AfterValidator(check)


class Settings(BaseModel):
    """A section of the recipe: unknown fields are errors, values don't change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Lora(Settings):
    """The adapter. Source: LoRA, arXiv 2106.09685."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = "all-linear"


class PolicySettings(Settings):
    """The model that is trained: a frozen, quantised base and an adapter."""

    model: str = "lab"
    revision: str | None = None
    adapter: str | None = None
    reference: Literal["base", "adapter"] = "base"
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    double_quantization: bool = True
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    context: int | None = Field(None, ge=8)
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool = True
    trust_remote_code: bool = False
    lora: Lora = Lora()

    @model_validator(mode="after")
    def _reference_needs_adapter(self) -> PolicySettings:
        if self.reference == "adapter" and self.adapter is None:
            raise ValueError("reference: adapter needs policy.adapter, the one to start from")
        return self


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Columns(Settings):
    """Which column of the data set holds what; solutions may be spread over several columns.

    `a.b` is field `b` of a nested column `a`. `answer: null` says that there are no answers.
    `answer_from` takes the last box of that column (boxed) or what follows `####` (hash).
    `clean: gsm8k` drops `<<48/2=24>>` from demonstrations and boxes their `#### 24` line.
    """

    problem: str = "problem"
    answer: str | None = "answer"
    answer_from: Literal["plain", "boxed", "hash"] = "plain"
    expert: Annotated[list[str], BeforeValidator(_as_list)] = []
    teacher: Annotated[list[str], BeforeValidator(_as_list)] = []
    id: str | None = None
    clean: Literal["gsm8k"] | None = None


class Prompt(Settings):
    """How a problem becomes a prompt: plain text, or a user turn of the chat template."""

    style: Literal["plain", "chat"] = "plain"
    template: str = "{problem}"
    system: str | None = None

    @model_validator(mode="after")
    def _template_has_problem(self) -> Prompt:
        if "{problem}" not in self.template:
            raise ValueError("template: must contain {problem}")
        if self.system is not None and self.style == "plain":
            raise ValueError("system: needs prompt.style: chat")
        return self


class DataSettings(Settings):
    """Rows to problems: the built-in `lab`, a JSONL/parquet/CSV file, or a hub data set id."""

    source: str = "lab"
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    columns: Columns = Columns()
    prompt: Prompt = Prompt()
    max_prompt_tokens: int | None = Field(None, ge=1)
    problems: int | None = Field(None, ge=1)
    shuffle: bool = True
    seed: int = 0


class TrainingData(DataSettings):
    """The training data and how many problems of it are held out for monitoring."""

    holdout: int = Field(64, ge=0)


class GroupSettings(Settings):
    """How many of the K responses of a group come from each source."""

    expert: int = Field(1, ge=0)
    teacher: int = Field(3, ge=0)
    self: int = Field(4, ge=0)
    shortfall: Literal["self", "repeat", "drop"] = "self"

    @model_validator(mode="after")
    def _not_empty(self) -> GroupSettings:
        if self.size == 0:
            raise ValueError("expert + teacher + self: must be at least 1")
        return self

    @property
    def size(self) -> int:
        """K, the number of responses of a group."""
        return self.expert + self.teacher + self.self


class ObjectiveSettings(Settings):
    """The loss; a method reads the fields that it has a use for."""

    tau: float = Field(0.7, ge=0)
    std: Literal["sample", "population", "none"] = "sample"
    eps: float = Field(1e-6, gt=0)
    reduction: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    clip_low: float = Field(0.2, ge=0, lt=1)
    clip_high: float = Field(0.2, ge=0)
    kl: float = Field(0.0, ge=0)


class RewardFunction(Settings):
    """One reward function and its weight in the sum."""

    name: Annotated[str, _named_in("gft_lite.rewards:REWARDS")]
    weight: float = 1.0
    parameters: dict[str, Any] = {}


def _reward_shorthand(value: Any) -> Any:
    items = [value] if isinstance(value, (str, dict)) else value
    if not isinstance(items, list):
        return items
    return [{"name": item} if isinstance(item, str) else item for item in items]


class RewardSettings(Settings):
    """The reward rule: a weighted sum of functions, graded in worker processes."""

    functions: Annotated[
        list[RewardFunction], BeforeValidator(_reward_shorthand), Field(min_length=1)
    ] = Field(default_factory=lambda: [RewardFunction(name="math")])
    workers: int = Field(2, ge=1)
    timeout: float = Field(3.0, gt=0)


class RolloutSettings(Settings):
    """Who samples the self responses, and how."""

    engine: Annotated[str, _named_in("gft_lite.rollout:ENGINES")] = "auto"
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_tokens: int = Field(1024, ge=1)
    stop: Annotated[list[str], BeforeValidator(_as_list)] = []
    batch_size: int = Field(128, ge=1)
    base: Literal["nf4_dequantised", "original"] = "nf4_dequantised"
    gpu_memory: float = Field(0.4, gt=0, lt=1)
    kv_cache_mib: int | None = Field(None, ge=1)
    eager: bool = True
    probe_limit: float = Field(0.2, gt=0)


class OptimSettings(Settings):
    """The optimiser, its schedule, and what it does about gradients that are no numbers."""

    name: Literal["auto", "adamw", "paged_adamw_8bit"] = "auto"
    lr: float = Field(1e-4, gt=0)
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = Field(1.0, gt=0)
    max_bad_steps: int = Field(3, ge=1)


class LoopSettings(Settings):
    """How long and in which portions: one step is one rollout of `problems_per_step` groups."""

    steps: int = Field(100, ge=1)
    problems_per_step: int = Field(16, ge=1)
    updates_per_rollout: int = Field(1, ge=1)
    micro_batch_tokens: int = Field(8192, ge=1)

    @model_validator(mode="after")
    def _updates_fit(self) -> LoopSettings:
        if self.updates_per_rollout > self.problems_per_step:
            raise ValueError("updates_per_rollout: must not exceed problems_per_step")
        return self


class MonitorSettings(Settings):
    """KL to the reference every n steps (0: never), on fixed held-out prompts."""

    every: int = Field(10, ge=0)
    problems: int = Field(16, ge=1)


class EvalSettings(Settings):
    """Base and trained policy on named sets, the first of which is the headline."""

    sets: dict[str, DataSettings] = {}
    samples: int = Field(8, ge=1)
    k: list[Annotated[int, Field(ge=1)]] = [1, 8]
    temperature: float = Field(0.5, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _enough_samples(self) -> EvalSettings:
        if self.k and max(self.k) > self.samples:
            raise ValueError(f"k: must not exceed eval.samples, got {max(self.k)} > {self.samples}")
        return self


class CheckpointSettings(Settings):
    """A checkpoint every n steps; the newest `keep` stay on the disk."""

    every: int = Field(25, ge=1)
    keep: int = Field(2, ge=1)


class LogSettings(Settings):
    """What is written beside metrics.jsonl."""

    groups: bool = True
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []


class Recipe(Settings):
    """A whole experiment. `Recipe.load` reads one from YAML."""

    name: str = Field("run", pattern=r"^[\w.-]+$")
    seed: int = Field(0, ge=0, lt=2**31)
    method: Annotated[str, _named_in("gft_lite.objective:METHODS")] = "gft"
    policy: PolicySettings = PolicySettings()
    data: TrainingData = TrainingData()
    group: GroupSettings = GroupSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    reward: RewardSettings = Field(default_factory=RewardSettings)
    rollout: RolloutSettings = RolloutSettings()
    optim: OptimSettings = OptimSettings()
    train: LoopSettings = LoopSettings()
    monitor: MonitorSettings = MonitorSettings()
    eval: EvalSettings = EvalSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="before")
    @classmethod
    def _under_it_the_methods_defaults(cls, tree: Any) -> Any:
        known = METHODS.get(str(tree.get("method", "gft"))) if isinstance(tree, Mapping) else None
        return _merge(known.defaults, tree) if known else tree

    @model_validator(mode="after")
    def _group_fits_method(self) -> Recipe:
        method = METHODS.get(self.method)
        for source in ("expert", "teacher", "self") if method else ():
            if getattr(self.group, source) and source not in method.sources:
                raise ValueError(
                    f"group.{source}: must be 0 with method {self.method}, which trains on "
                    f"{' and '.join(method.sources)} rows"
                )
        if method and "self" not in method.sources and self.group.shortfall == "self":
            raise ValueError(
                f"group.shortfall: must be repeat or drop with method {self.method}, "
                "which has no self rows"
            )
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe file, what it extends, and `key=value` overrides.

        Raises: RecipeError with every error found.
        """
        tree, places = read_tree(find_recipe(path), overrides)
        return cls.from_tree(tree, places)

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], places: Places | None = None) -> Recipe:
        """Check a nested dict against the schema. Raises: RecipeError with every error found."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            problems = [_explain(e, places or {}) for e in error.errors()]
            raise RecipeError(problems) from None

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out, as YAML that `load` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class RecipeError(Exception):
    """The user's recipe is wrong; `problems` holds one text for each error."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


# --- reading ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a value was written."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


Places = dict[tuple[str | int, ...], Place]


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-5` is a number, as YAML 1.2 says and PyYAML's 1.1 does not."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag != "tag:yaml.org,2002:float"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d[\d_]*(?:[eE][-+]?\d+)?"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
    ),
    list("-+0123456789."),
)


def find_recipe(path: str | Path) -> Path:
    """The recipe file at `path`, or the shipped one of that name.

    Shipped recipes lie beside the package in a checkout and inside it in a wheel.
    """
    path = Path(path)
    shipped = [PACKAGE.parent / path, PACKAGE / "shipped" / path]
    candidates = [path] if path.is_absolute() else [path, *shipped]
    found = next((p for p in candidates if p.is_file()), None)
    if found is None:
        raise RecipeError([f"{path}: no such recipe file.{_nearest_file(path)}"])
    return found


def _nearest_file(path: Path) -> str:
    folders = [path.parent, PACKAGE.parent / "recipes", PACKAGE / "shipped" / "recipes"]
    names = {str(f.parent / f.name): f.name for d in folders for f in d.glob("*.yaml")}
    close = difflib.get_close_matches(path.name, list(names.values()), n=1, cutoff=0.5)
    return f" Did you mean recipes/{close[0]}?" if close else ""


def read_tree(path: Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Places]:
    """The merged tree of a recipe file and where each of its values was written.

    Raises: RecipeError for unreadable files, circular `extends` and malformed overrides.
    """
    tree, places = _read_file(path, ())
    for override in overrides:
        extra, where = _read_override(override)
        tree, places = _merge(tree, extra), places | where
    return tree, places


def _read_file(path: Path, parents: tuple[Path, ...]) -> tuple[dict[str, Any], Places]:
    resolved = path.resolve()
    if resolved in parents:
        chain = " -> ".join(p.name for p in (*parents, resolved))
        raise RecipeError([f"{path}: extends: must not be circular, got {chain}"])
    tree, places = _parse(path)
    bases = _as_list(tree.pop("extends", None) or [])
    if not (isinstance(bases, list) and all(isinstance(b, str) for b in bases)):
        raise RecipeError([f"{path}: extends: must be a list of files, got {bases!r}"])
    read = []
    for base in bases:
        file = path.parent / base
        if not file.is_file():
            where = places.get(("extends",), path)
            raise RecipeError([f"{where}: extends: no such file, got {base!r}"])
        read.append(_read_file(file, (*parents, resolved)))
    trees, wheres = [t for t, _ in read], [w for _, w in read]
    merged_places: Places = reduce(lambda a, b: a | b, [*wheres, places], {})
    return reduce(_merge, [*trees, tree], {}), merged_places


def _parse(path: Path) -> tuple[dict[str, Any], Places]:
    places: Places = {}
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
        _locate(node, (), str(path), places)
        tree = yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([f"{path}: must be a readable text file ({error})"]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError([f"{path}{line}: not valid YAML: {what}"]) from None
    except (ValueError, RecursionError) as error:
        raise RecipeError([f"{path}: not valid YAML: {error}"]) from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise RecipeError([f"{path}: must be a mapping of fields, got {type(tree).__name__}"])
    return tree, places


def _locate(node: yaml.Node | None, at: tuple[str | int, ...], file: str, places: Places) -> None:
    """Note the line of every key; a key written twice in one mapping is an error."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen:
                mark = key.start_mark
                raise yaml.MarkedYAMLError(problem=f"{name!r} is written twice", problem_mark=mark)
            seen.add(name)
            places[(*at, name)] = Place(file, key.start_mark.line + 1)
            _locate(value, (*at, name), file, places)
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            places[(*at, i)] = Place(file, item.start_mark.line + 1)
            _locate(item, (*at, i), file, places)


def _read_override(text: str) -> tuple[dict[str, Any], Places]:
    key, equals, raw = text.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise RecipeError([f"command line: must be key=value, got {text!r}"])
    try:
        value = yaml.load(raw, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError([f"command line: {key}: not valid YAML, got {raw!r} ({error})"]) from None
    for name in reversed(names):
        value = {name: value}
    where = {tuple(names[: i + 1]): Place("command line") for i in range(len(names))}
    return value, where


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` over `low`: mappings are merged key by key, everything else is replaced."""
    merged = dict(low)
    for key, value in high.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else value
    return merged


# --- explaining ------------------------------------------------------------------------------


def _explain(error: Any, places: Places) -> str:
    """One line for one pydantic error: place, field, rule, value and the nearest name."""
    loc = tuple(error["loc"])
    at = loc
    while at and at not in places:
        at = at[:-1]
    place = f"{places[at]}: " if at in places else ""
    # A union's branch names ("list[str]", "function-before") are pydantic's, not the user's.
    names = [p for i, p in enumerate(loc) if i < len(at) or _is_field(loc[:i], p)]
    field = ".".join(map(str, names)) or "recipe"
    if error["type"] == "extra_forbidden":
        known = _fields_at(loc[:-1])
        close = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        hint = f" Did you mean {'.'.join(map(str, (*loc[:-1], *close)))}?" if close else ""
        return f"{place}{field}: unknown field, got {_shown(error['input'])}.{hint}"
    rule = error["msg"].removeprefix("Value error, ")
    rule = re.sub(r"^Input should", "must", re.sub(r"^Field required", "is required", rule))
    nearest = _nearest_literal(error)
    return f"{place}{field}: {rule}, got {_shown(error['input'])}.{nearest}"


def _is_field(parents: tuple[str | int, ...], name: str | int) -> bool:
    return isinstance(name, int) or name in _fields_at(parents)


def _fields_at(loc: tuple[str | int, ...]) -> list[str]:
    """The field names of the section at `loc`."""
    model: Any = Recipe
    for name in loc:
        if isinstance(name, int):
            continue
        if isinstance(model, type) and issubclass(model, BaseModel):
            field = model.model_fields.get(name)
            model = _section_of(field.annotation) if field else None
        # Else a mapping of sections, such as eval.sets: its key leads to the same section.
    is_section = isinstance(model, type) and issubclass(model, BaseModel)
    return list(model.model_fields) if is_section else []


def _section_of(annotation: Any) -> Any:
    """The section class in an annotation such as `list[X]`, `dict[str, X]` or `X`."""
    arguments = getattr(annotation, "__args__", ())
    return next((_section_of(a) for a in reversed(arguments)), annotation)


def _nearest_literal(error: Any) -> str:
    if error["type"] != "literal_error":
        return ""
    return _nearest(error["input"], re.findall(r"'([^']*)'", error["ctx"]["expected"]))


def _nearest(name: Any, known: Any) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def _shown(value: Any) -> str:
    if isinstance(value, BaseModel | Mapping):
        return "a section"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
