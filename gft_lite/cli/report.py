"""`gft-lite report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gft_lite.cli.common import (
    DONE,
    add_allow_code,
    add_output,
    add_verbosity,
    run_folder,
    whole_number,
)
from gft_lite.cli.parser import add_command


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "report", "runs and sweeps as one page with plots and groups",
        group="look at results",
        description="Writes one HTML page without outside resources: curves of all metrics, "
        "results, and every group of responses with its rewards and advantages.",
        examples=[
            "gft-lite report runs/lab",
            "gft-lite report runs/gft runs/sft --out compare.html --plots plots",
        ],
    )  # fmt: skip
    parser.add_argument(
        "folders", nargs="+", type=run_folder, metavar="RUN_OR_SWEEP", help="their folders"
    )
    add_output(parser, "default: report.html", kind="file", default="report.html")
    add_output(parser, "every plot as SVG and PNG as well", flag="--plots")
    parser.add_argument("--groups", type=whole_number(1, 10**6), default=8, metavar="N",
                        help="groups shown of each step shown (default: 8)")  # fmt: skip
    parser.add_argument("--no-tokens", dest="tokens", action="store_false",
                        help="load no model: groups without p of each token")  # fmt: skip
    add_allow_code(parser)
    add_verbosity(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from gft_lite.report.page import write_report

    if options.tokens and not options.allow_code:
        from gft_lite.cli.trust import check_code_trust, remote_code
        from gft_lite.recipe.schema import Recipe

        for file in (f for folder in options.folders for f in Path(folder).rglob("recipe.yaml")):
            check_code_trust(remote_code(Recipe.load(file).policy), [file])
    page = write_report(
        options.folders, options.out, plots=options.plots, tokens=options.tokens,
        groups=options.groups,
    )  # fmt: skip
    print(f"report: {page}")
    return DONE
