"""`gft-lite chat`."""

from __future__ import annotations

import argparse
from typing import Any

from gft_lite.cli.common import (
    DONE,
    MAX_TOKENS,
    add_allow_code,
    add_verbosity,
    check_model_trust,
    non_negative,
    show_imports,
    whole_number,
)
from gft_lite.cli.parser import add_command
from gft_lite.utils.errors import UserError


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "chat", "talk to a run, an adapter or a model", group="look at results",
        description="Answers each line that you enter, with the prompt format of the run. /base"
        " repeats the last question without the adapter; Ctrl-C stops an answer, "
        "Ctrl-D ends the chat.",
        examples=[
            "gft-lite chat runs/lab",
            'gft-lite chat runs/gft --prompt "What is 7 times 8?"',
            "gft-lite chat Qwen/Qwen2.5-0.5B-Instruct --quantization none",
        ],
    )  # fmt: skip
    parser.add_argument("target", metavar="TARGET", help="lab, a hub id, or the folder of a "
                        "model, an adapter or a run; RUN@step-N is a checkpoint")  # fmt: skip
    parser.add_argument("--prompt", metavar="TEXT", help="answer this one, and leave")
    parser.add_argument("--base", action="store_true", help="begin with the adapter off")
    parser.add_argument("--temperature", type=non_negative, default=0.0, metavar="T",
                        help="default: 0, the likeliest token each time")  # fmt: skip
    parser.add_argument("--max-tokens", type=whole_number(1, MAX_TOKENS), metavar="N",
                        help="of an answer (default: as in the run, or 512)")  # fmt: skip
    parser.add_argument("--style", choices=["plain", "chat"], help="of the prompt (default: as in "
                        "the run, else chat where the model has a template)")  # fmt: skip
    parser.add_argument("--quantization", choices=["nf4", "int8", "none"],
                        help="of the base (default: the run's, or nf4)")  # fmt: skip
    add_allow_code(parser)
    add_verbosity(parser)
    parser.set_defaults(run=run, again="nothing is kept")


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from gft_lite.cli.inputs import check_targets
    from gft_lite.evaluation.targets import find_targets
    from gft_lite.recipe.sections import PolicySettings

    given = {"quantization": options.quantization} if options.quantization else {}
    targets = find_targets([options.target], PolicySettings.model_validate(given))
    if not options.allow_code:
        check_model_trust(targets)
    if len(targets) != 1:
        rule = f"must be one, got {len(targets)}"
        raise UserError([f"TARGET: {rule}. Name one of its checkpoints."])
    check_targets(targets)
    with show_imports():
        from gft_lite.tools.chat import Chat, answer_once, interact, sampling_for
    from gft_lite.utils.progress import show_phase, stderr_console

    sampling = sampling_for(targets, options.temperature, options.max_tokens)
    console = stderr_console()
    with show_phase(console, f"loading {options.target}"):
        chat = Chat(targets[0], sampling, base=options.base, style=options.style)
    if options.prompt is not None:
        answer_once(chat, options.prompt)
    else:
        interact(chat, console)
    return DONE
