"""Every section of a recipe, from the file that defines it."""

from gft_lite.recipe.course_sections import (
    BestSettings,
    CheckpointSettings,
    EarlyStopSettings,
    EvalSettings,
    FigureSettings,
    GuardSettings,
    LogSettings,
    MonitorSettings,
)
from gft_lite.recipe.data_sections import (
    ColumnsSettings,
    DataSettings,
    DifficultySettings,
    PromptSettings,
    TrainingDataSettings,
)
from gft_lite.recipe.lora_section import LoraSettings
from gft_lite.recipe.objective_sections import (
    ImportanceSettings,
    ObjectiveSettings,
    RewardFunctionSettings,
    RewardSettings,
)
from gft_lite.recipe.policy_section import DtypeName, PolicySettings
from gft_lite.recipe.rollout_sections import ENGINE_NAMES, GroupSettings, RolloutSettings
from gft_lite.recipe.training_sections import (
    BudgetSettings,
    OptimSettings,
    StageSettings,
    TeacherSettings,
    TrainSettings,
)

__all__ = [
    "ENGINE_NAMES",
    "BestSettings",
    "BudgetSettings",
    "CheckpointSettings",
    "ColumnsSettings",
    "DataSettings",
    "DifficultySettings",
    "DtypeName",
    "EarlyStopSettings",
    "EvalSettings",
    "FigureSettings",
    "GroupSettings",
    "GuardSettings",
    "ImportanceSettings",
    "LogSettings",
    "LoraSettings",
    "MonitorSettings",
    "ObjectiveSettings",
    "OptimSettings",
    "PolicySettings",
    "PromptSettings",
    "RewardFunctionSettings",
    "RewardSettings",
    "RolloutSettings",
    "StageSettings",
    "TeacherSettings",
    "TrainSettings",
    "TrainingDataSettings",
]
