"""doctor: what this machine can hold."""

from __future__ import annotations

import typer

from tools.cli.common import JsonOption, print_json


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command()(doctor)


def doctor(json: JsonOption = False) -> int:
    """Look at the limits of this machine, one line each, with the fix where one is too small."""
    from dataclasses import asdict

    from tools.doctor import examine, exit_code

    findings = examine()
    if json:
        print_json([asdict(finding) for finding in findings])
    else:
        width = max(len(finding.subject) for finding in findings)
        for finding in findings:
            fix = f"; fix: {finding.fix}" if finding.fix else ""
            print(f"{finding.state:<8} {finding.subject:<{width}}  {finding.found}{fix}")
    return exit_code(findings)
