"""The golden scripts of `tests/scripts`, one test a file; the language is told in
`tests.support.scripts`.

    REWRITE_SCRIPTS=1 python -m pytest tests/t2_machine/test_scripts.py

writes the traces anew.  Read the difference before you believe it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from ipc.abi import FIRST_FAULT_REASON, Reason, Status
from tests.support.notation import ScriptError
from tests.support.scripts import first_comment, parse, play, render

FOLDER = Path(__file__).parents[1] / "scripts"
SCRIPTS = sorted(FOLDER.glob("*.tmem"))


@pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_script(path: Path) -> None:
    """What the machine answers is what the script says."""
    text = path.read_text()
    played = render(play(text))

    if os.environ.get("REWRITE_SCRIPTS"):
        path.write_text(played)
    else:
        assert text == played


def _traces() -> str:
    return "\n".join(
        line for path in SCRIPTS for block in parse(path.read_text()) for line in block.trace
    )


def test_every_status_and_reason_has_a_script() -> None:
    """Faults too."""
    words = set(re.findall(r"[A-Z_]{3,}", _traces()))

    assert {status.name for status in Status if status is not Status.DONE} <= words
    assert {reason.name for reason in Reason if reason < FIRST_FAULT_REASON} - {"NONE"} <= words
    assert {reason.name for reason in Reason if reason >= FIRST_FAULT_REASON} <= words


def test_every_rule_and_row_has_a_script() -> None:
    """The first comment names what it is about: a rule of 1.5, a row of table 1.3 of the reference
    notes, another section of them, or a promise of ours."""
    comments = [first_comment(path) for path in SCRIPTS]

    for path, comment in zip(SCRIPTS, comments, strict=True):
        assert re.match(r"(1\.3 [A-Z_]+|1\.5 rule \d+|[1-5]\.\d|ours)", comment), path.name
    together = "\n".join(comments)
    for rule in range(1, 13):
        assert re.search(rf"1\.5 rule {rule}\b", together), f"rule {rule}"
    for row in (
        *("CONTROL", "NEW_POOL", "DESTROY_POOL", "NEW_PAGE", "PUT_PAGE", "GET_PAGE"),
        *("FLUSH_PAGE", "FLUSH_OBJECT", "READ_WRITE_XCHG", "AUTH_RESTORE_NEW"),
        *("ANYTHING_ELSE", "OFF"),
    ):
        assert f"1.3 {row}" in together, row


def test_a_wrong_trace_is_noticed() -> None:
    """And a script that is none."""
    text = "guest a\n---\nb attached\n"

    assert render(play(text)) == "guest a\n---\na attached\n"
    with pytest.raises(ScriptError):
        play("guest a\n")
    with pytest.raises(ScriptError):
        play("dance\n---\n")
