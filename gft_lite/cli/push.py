"""`gft-lite push`."""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gft_lite.cli.common import (
    DONE,
    add_allow_code,
    add_verbosity,
    check_model_trust,
    show_imports,
)
from gft_lite.cli.parser import add_command


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "push", "upload an adapter or a merged model to the hub",
        group="use and share a model",
        description="Uploads a run's adapter, or with --merged the merged model, with its card "
        "and metrics, in one commit. Files that contain a token are not uploaded.",
        examples=[
            "gft-lite push runs/gft me/gft --dry-run",
            "gft-lite push runs/gft me/gft --merged --private",
        ],
    )  # fmt: skip
    parser.add_argument(
        "target", metavar="RUN", help="a finished run, or the folder of an adapter or merged model"
    )
    parser.add_argument("repository", metavar="REPO", help="USER/MODEL; created if needed")
    parser.add_argument("--merged", action="store_true",
                        help="merge the adapter first, as gft-lite merge does")  # fmt: skip
    parser.add_argument("--private", action="store_true", help="only you can see the repository")
    parser.add_argument("--dry-run", action="store_true",
                        help="print files and sizes; needs no token and no network")  # fmt: skip
    add_allow_code(parser)
    add_verbosity(parser)
    parser.set_defaults(run=run, again="nothing was uploaded")


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from gft_lite.tools.push import (
        check_repository,
        describe,
        files_to_push,
        find_token,
        local_base,
        push,
    )

    check_repository(options.repository)
    token = "" if options.dry_run else find_token()
    files_to_push(options.target)  # A wrong target is an error before anything is merged.
    with ExitStack() as stack:
        merged = _merge(options, stack) if options.merged else None
        files = files_to_push(options.target, merged)
        print("\n".join(describe(files)))
        if base := local_base(files):
            print(f"note: adapter_config.json names the base {base}, a folder that others lack; "
                  "--merged needs no base")  # fmt: skip
        if not options.dry_run:
            url = push(files, options.repository, private=options.private, token=token)
            print(f"uploaded: {url}")
    return DONE


def _merge(options: argparse.Namespace, stack: ExitStack) -> Path:
    """The folder of the merged model, beside the run; `stack` removes it."""
    from gft_lite.cli.inputs import check_targets
    from gft_lite.evaluation.targets import find_adapter

    found = [find_adapter(options.target)]
    if not options.allow_code:
        check_model_trust(found)
    check_targets(found)
    with show_imports():
        from gft_lite.tools.merge import merge

    beside = Path(options.target).resolve().parent
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".push-", dir=beside)))
    merge(options.target, scratch / "model")
    return scratch / "model"
