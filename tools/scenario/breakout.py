"""Breaking out: whatever a guest sends or writes, to reach what is not its own.

`alpha` goes on working, and its pages are compared; the hypervisor has to live through all of it.
"""

from __future__ import annotations

import contextlib
import io
import os
import time
from typing import Any, Final

from fs.errors import ImageError
from fs.mount import mount_image
from ipc.errors import ExitCode, OperatorError
from tools.scenario.scenario import Scenario
from tools.scenario.stage import Grant, Player, Stage, World, adversary
from tools.scenario.volume import make_volume

_WORK: Final[dict[str, Any]] = {"task": "work", "pages": 32, "kind": "persistent"}
_SECONDS: Final = 1.5
_FAULTS_FOR_EVER: Final = 1 << 40
_FAULTS: Final = (
    "bad_length",
    "unknown_op",
    "bad_count",
    "bad_slot",
    "bad_index",
    "reserved_bits",
    "bad_flags",
    "bad_pool_flags",
    "bad_spec_version",
    "bad_page_size",
    "invalid_oid",
)
_REFUSALS: Final = (
    "no_such_pool",
    "too_many_pools",
    "shared_denied",
    "too_many_sharers",
    "pool_empty",
)


def _while_alpha_works(
    stage: Stage, world: World, by: tuple[str, ...], **parameters: Any
) -> dict[str, Any]:
    world.begin("alpha", seconds=_SECONDS, rounds=10**6, **_WORK)
    report = world.attack("mallory", by=by, **parameters)
    world.count_check("alpha", world.finish("alpha"))
    lives = world.ask("ping")
    if "error" in lives or world.cluster.restarts:
        stage.tally.succeeded += 1
        stage.say("the hypervisor has died")
    return report


def _calls(noun: str, by: tuple[str, ...], **parameters: Any) -> Any:
    def run(stage: Stage) -> None:
        cast = (Player("alpha"), Player("mallory", adversary(noun)))
        options = {"faults_max": _FAULTS_FOR_EVER}
        with stage.cluster(*cast, hypervisor=options) as world:
            _while_alpha_works(stage, world, by, **parameters)

    return run


def _privileges(stage: Stage) -> None:
    uuid = stage.random.randbytes(16)
    cast = (Player("alpha"), Player("mallory", adversary("privileges")))
    options = {"faults_max": _FAULTS_FOR_EVER}
    with stage.cluster(*cast, hypervisor=options, grants=[Grant("alpha", uuid)]) as world:
        before = world.ask("auth", action="list")
        _while_alpha_works(stage, world, ("unknown_op", "shared_denied"), uuid=uuid.hex())
        if world.ask("auth", action="list") != before:
            stage.tally.succeeded += 1
            stage.say("the grants have changed")


def _leftovers(stage: Stage) -> None:
    uuid = stage.random.randbytes(16)
    cast = (Player("alpha"), Player("mallory", adversary("leftovers")))
    with stage.cluster(*cast, grants=[Grant("alpha", uuid), Grant("mallory", uuid)]) as world:
        file: dict[str, Any] = {"uuid": uuid.hex(), "pages": 32}
        pool = world.play("alpha", task="fill", **file).get("pool", 0)
        _while_alpha_works(stage, world, _REFUSALS, uuid=uuid.hex())
        # What it left behind can be evicted like anything else.
        world.check("alpha", pool=pool, **{**file, "owner": "alpha"})
        flushed = world.ask("flush", size_bytes=1 << 30)
        left = world.ask("list")["arena"]["ephemeral_pages"]
        stage.say(f"administrator: dropped {flushed['flushed_pages']} ephemeral pages, {left} left")
        stage.tally.succeeded += left


def _window(stage: Stage) -> None:
    cast = (Player("alpha"), Player("mallory", adversary("windowplay")))
    options = {"faults_max": _FAULTS_FOR_EVER}
    with stage.cluster(*cast, hypervisor=options) as world:
        by = ("operation not permitted", "file too large")
        _while_alpha_works(stage, world, by, seconds=_SECONDS)
        faults = world.ask("stats")["guests"]["mallory"]["faults"]
        stage.say(f"hypervisor: {sum(faults.values()):,} faults of mallory")
        stage.tally.caught += sum(faults.values())


def _lock_messages(stage: Stage) -> None:
    volume = make_volume(stage, "alpha", "mallory")
    cast = (volume.player("alpha"), volume.player("mallory", "lockmessages"))
    with stage.cluster(*cast, grants=volume.grants()) as world:
        # Who sends rubbish may be cut off by the others, and then ends by itself.
        world.expendable.add("mallory")
        before = _messages_dropped(world)
        world.begin("alpha", "read_all", **volume.reading(3))
        report = world.play("mallory", messages=600)
        stage.tally.attempts += report.get("attempts", 0)
        stage.say(f"mallory: {report.get('attempts', 0)} messages that are none")
        world.finish("alpha")
        malformed, refused = (
            after - so_far for so_far, after in zip(before, _messages_dropped(world), strict=True)
        )
        stage.say(f"alpha: dropped {malformed} that were no message, {refused} that made no sense")
        stage.tally.caught += malformed + refused
        world.count_files("alpha")
        if "alpha" not in world.cluster.alive:
            stage.tally.succeeded += 1


def _messages_dropped(world: World) -> tuple[int, int]:
    """Of what came to alpha from other nodes: no message at all, and refused for what it says."""
    node = (world.status("alpha") or {}).get("node") or {}
    return node.get("messages_malformed", 0), node.get("messages_refused", 0)


def _forged_disk(stage: Stage) -> None:
    cast = (Player("alpha"), Player("mallory", adversary("diskforger"), cleancache=True))
    with stage.cluster(*cast) as world:
        world.expendable.add("mallory")
        image = world.directory.images / "mallory.img"
        sound = image.read_bytes()
        for kind, span in (("bits", 1), ("random", 2), ("random", 24)):
            report = world.play("mallory", kind=kind, span=span)
            stage.tally.attempts += report.get("attempts", 0)
            stage.say(f"mallory: {kind} over {report.get('attempts', 0)} blocks of its disk")
            world.end("mallory")
            _look_at_image(stage, world)
            stage.say(f"started again on it: {_start_again(stage, world)}")
            world.end("mallory")
            image.write_bytes(sound)
            _start_again(stage, world)
        world.count_check("alpha", world.play("alpha", rounds=5, **_WORK))


def _look_at_image(stage: Stage, world: World) -> None:
    """As the host does before it starts a guest."""
    image = world.directory.images / "mallory.img"
    try:
        mount_image(image, clock_ns=time.time_ns, read_only=True).unmount()
        found = "the host can mount it"
    except (ImageError, OSError) as error:
        found = str(error)
        stage.tally.caught += 1
    stage.say(f"host: {found}")


def _start_again(stage: Stage, world: World) -> str:
    try:
        world.cluster.revive("mallory")
    except OperatorError as error:
        world.cluster.watch()
        if error.exit_code not in (ExitCode.NO_INPUT, ExitCode.GUEST_DIED):
            stage.problem(f"mallory ended with {error.exit_code!r}")
        if error.exit_code == ExitCode.GUEST_DIED:
            stage.tally.succeeded += 1
        return str(error)
    return "it runs"


def _lies(stage: Stage) -> None:
    assert stage.command is not None, "this one is about what commands make of answers"
    cast = (Player("alpha"), Player("mallory", adversary("liar")))
    with stage.cluster(*cast) as world:
        world.expendable.add("mallory")
        told = world.play("mallory").get("lies", 0)
        run = os.fspath(world.directory.path)
        commands = (
            ["ps", "--run", run],
            ["locks", "--run", run],
            ["exec", "--run", run, "mallory", "--", "ls"],
            ["stats", "--run", run],
            ["balloon", "--run", run, "mallory"],
            ["fs", "stat", "--run", run, "--guest", "mallory"],
        )
        for number in range(told):
            command = commands[number % len(commands)]
            output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
            stage.tally.attempts += 1
            try:
                with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                    stage.command(command)
            except Exception as error:  # noqa: BLE001
                stage.tally.succeeded += 1
                stage.say(f"tmem {command[0]}: {type(error).__name__}: {error}"[:200])
                continue
            output.seek(0)
            if "\x1b" in output.read():
                stage.tally.succeeded += 1
                stage.say(f"tmem {command[0]} printed what drives a terminal")
            else:
                stage.tally.caught += 1
        stage.say(f"mallory told {told} lies to ps, locks, exec, stats, balloon and fs stat")
        world.count_check("alpha", world.play("alpha", rounds=5, **_WORK))


def _inherited(stage: Stage) -> None:
    cast = (Player("alpha"), Player("mallory", adversary("inherited")))
    with stage.cluster(*cast, jail=stage.jail) as world:
        _while_alpha_works(stage, world, ("nothing of the kind is open",))


SCENARIOS: Final = (
    Scenario(
        "malformed-calls",
        "breakout",
        "malformed",
        "calls with every field wrong, sums that wrap, negative ids, random requests (XSA-15)",
        "one parser of guests' bytes: a fault reply, and nothing else happens",
        None,
        "In 2012 seven CVEs were found in the handling of a guest's numbers. The rows are tried "
        "again from inside the jail.",
        _calls("malformed", (*_FAULTS, *_REFUSALS)),
    ),
    Scenario(
        "privileged-calls",
        "breakout",
        "privileges",
        "the administrator's operations: control, authorization, restore, and all unknown ones",
        "no channel of a guest leads to the administrator's verbs",
        None,
        "Until 2017 any guest of Xen could authorize itself, or open all shared pools to all.",
        _privileges,
    ),
    Scenario(
        "leftovers",
        "breakout",
        "leftovers",
        "ids of pools that are gone or were never made; pages that are left behind",
        "an id that was given back leads nowhere; pages of who left can be evicted",
        None,
        "These were found by reading Xen's source: a pool that could not be made left a pointer, a "
        "sharer that left pinned the pool's memory.",
        _leftovers,
    ),
    Scenario(
        "window-words",
        "breakout",
        "windowplay",
        "random words in the shared window while calls are served; a window that shrinks",
        "bytes are copied once and then checked; the window is sealed",
        None,
        "Memory that two sides have is changed between the look and the use, if it is looked at "
        "twice.",
        _window,
        must_catch=False,
    ),
    Scenario(
        "lock-messages",
        "breakout",
        "lockmessages",
        "malformed lock, membership and range messages to the other nodes of its cluster",
        "parsers that take any bytes and drop what is no message",
        None,
        "Nodes trust each other's messages to mean what they say, and not to be messages at all.",
        _lock_messages,
    ),
    Scenario(
        "forged-disk",
        "breakout",
        "diskforger",
        "rubbish over the metadata of its own disk, which the host looks at, too",
        "file systems that believe nothing: an image that makes no sense is told in one line",
        None,
        "A guest owns its disk and may write anything there. Whoever mounts it afterwards reads "
        "what an enemy wrote.",
        _forged_disk,
    ),
    Scenario(
        "inherited",
        "breakout",
        "inherited",
        "pipes, console and input that were open before it, because its starter had them",
        "the jail: all is closed that the guest has not opened itself",
        "the guest runs without a jail",
        "What is open stays open: no filter asks where a descriptor came from. One byte into the "
        "pipe of the fork server ends it, and its owner takes all guests for dead.",
        _inherited,
    ),
    Scenario(
        "lying-guest",
        "breakout",
        "liar",
        "answers to the supervisor that are no records, too long, nested, or drive a terminal",
        "one bounded reader of records; commands that say so in one line",
        None,
        "The way from a guest to the people who run it: what 'tmem ps' shows comes from guests.",
        _lies,
    ),
)
