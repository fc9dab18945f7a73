"""Poisoning: making others read bytes that are not the file's.

The cast: `alpha` reads a file from its disk and caches it in the shared pool, `bravo` gets it from
there and compares every page, `mallory` is up to no good.
"""

from __future__ import annotations

import dataclasses
import mmap
from pathlib import Path
from typing import Any, Final

from guests.adversaries.raw import file_oid, page_of
from ipc.abi import PAGE_BYTES
from tools.scenario.scenario import Scenario
from tools.scenario.stage import JAILED, MIB, Grant, Player, Stage, World, adversary
from tools.scenario.volume import TIMING, Volume, make_volume

_PAGES: Final = 32
_SOON_DEAD: Final = dataclasses.replace(TIMING, dead_threshold=12, idle_timeout_ns=1_500_000_000)
"""A silent node is dead after 2.4 s: here one has to die."""
_DEAF_SECONDS: Final = 6.0
_LOOKS: Final = 8
_FILE: Final[dict[str, Any]] = {"owner": "alpha", "pages": _PAGES}


def _uuid(stage: Stage) -> bytes:
    return stage.random.randbytes(16)


def _cast(module: str) -> tuple[Player, ...]:
    return Player("alpha"), Player("bravo"), Player("mallory", adversary(module))


def _reader_puts(stage: Stage) -> None:
    uuid = _uuid(stage)
    grants = [
        Grant("alpha", uuid),
        Grant("bravo", uuid, "reader"),
        Grant("mallory", uuid, "reader" if stage.defence else "writer"),
    ]
    with stage.cluster(*_cast("forgery"), grants=grants) as world:
        world.play("alpha", task="fill", uuid=uuid.hex(), **_FILE)
        world.attack("mallory", by=("not_writer",), uuid=uuid.hex(), pages=_PAGES)
        world.check("bravo", uuid=uuid.hex(), **_FILE)


def _guessed_uuid(stage: Stage) -> None:
    uuid = _uuid(stage)
    grants = [Grant("alpha", uuid), Grant("bravo", uuid, "reader")]
    if not stage.defence:
        grants.append(Grant("mallory", uuid))
    with stage.cluster(*_cast("forgery"), grants=grants) as world:
        world.play("alpha", task="fill", uuid=uuid.hex(), **_FILE)
        world.attack("mallory", by=("shared_denied",), uuid=uuid.hex(), pages=_PAGES)
        world.check("bravo", uuid=uuid.hex(), **_FILE)


def _revoked_member(stage: Stage) -> None:
    uuid = _uuid(stage)
    grants = [Grant("alpha", uuid), Grant("bravo", uuid, "reader"), Grant("mallory", uuid)]
    with stage.cluster(*_cast("forgery"), grants=grants) as world:
        # It is a good member at first: a file of its own, which nobody else reads.
        joined = world.play("mallory", uuid=uuid.hex(), pages=1, ino=99)
        world.play("alpha", task="fill", uuid=uuid.hex(), **_FILE)
        if stage.defence:
            world.ask("auth", action="deny", guest="mallory", uuid=uuid.hex())
            stage.say("administrator: takes mallory's grant back; mallory is in the pool still")
        pool = joined.get("pool", 0)
        world.attack("mallory", by=("shared_denied",), uuid=uuid.hex(), pages=_PAGES, pool=pool)
        world.check("bravo", uuid=uuid.hex(), **_FILE)


def _stale_pages(stage: Stage) -> None:
    uuid = _uuid(stage)
    grants = [Grant(name, uuid) for name in ("alpha", "bravo", "mallory")]
    # The numbers of the file's exclusive lock; without fencing no call carries one.
    then, now = (5, 6) if stage.defence else (0, 0)
    with stage.cluster(*_cast("latecomer"), grants=grants) as world:
        pools = {
            name: world.play(name, task="drop", uuid=uuid.hex(), pages=1)["pool"]
            for name in ("alpha", "bravo")
        }
        world.play("alpha", task="fill", pool=pools["alpha"], token=then, version=1, **_FILE)
        stage.say("mallory holds the lock and is stopped; it is declared dead, alpha has the lock")
        world.play("alpha", task="drop", pool=pools["alpha"], token=now, **_FILE)
        kept = _PAGES // 2
        world.play(
            "alpha",
            task="fill",
            pool=pools["alpha"],
            token=now,
            version=2,
            **{**_FILE, "pages": kept},
        )
        stage.say(f"alpha has changed the file and caches {kept} of its pages; mallory wakes up")
        world.attack(
            "mallory",
            by=("stale_token",),
            uuid=uuid.hex(),
            owner="alpha",
            version=1,
            pages=_PAGES,
            token=then,
        )
        world.check("bravo", pool=pools["bravo"], version=2, **_FILE)


def _reused_inode(stage: Stage) -> None:
    uuid = _uuid(stage)
    grants = [Grant(name, uuid) for name in ("alpha", "bravo", "mallory")]
    # Without generations a file is its inode number, as it was for most of Linux's file systems.
    old, new = (1, 2) if stage.defence else (0, 0)
    kept = _PAGES // 2
    with stage.cluster(*_cast("forgery"), grants=grants) as world:
        report = world.play("mallory", uuid=uuid.hex(), pages=_PAGES, ino=12, generation=old)
        stage.say(f"mallory caches {report.get('succeeded', 0)} pages of its file, inode 12")
        stage.say("mallory removes the file without a flush; inode 12 becomes a file of alpha's")
        file = {**_FILE, "ino": 12, "generation": new}
        world.play("alpha", task="fill", uuid=uuid.hex(), **{**file, "pages": kept})
        found = world.check("bravo", uuid=uuid.hex(), **file)
        # What it left under the number where alpha has put nothing.
        stage.tally.attempts += _PAGES - kept
        stage.tally.succeeded += found.get("mismatches", 0)
        stage.tally.caught += found.get("missing", 0)


def _bit_rot(stage: Stage) -> None:
    options = {"checksums": stage.defence}
    with stage.cluster(Player("alpha"), arena_bytes=4 * MIB, hypervisor=options) as world:
        pool = world.play("alpha", task="fill", **_FILE).get("pool", 0)
        rotten = _rot(world, _PAGES // 2)
        stage.say(f"a bit flips in {rotten} pages of the arena")
        found = world.check("alpha", pool=pool, **_FILE)
        stage.tally.attempts += rotten
        stage.tally.succeeded += found.get("mismatches", 0)
        stage.tally.caught += world.ask("stats").get("damaged_pages", 0)


def _rot(world: World, pages: int) -> int:
    """Flip a bit in so many of alpha's pages where they lie; how many there were."""
    name = (world.directory.path / "arena").read_text().strip().lstrip("/")
    done = 0
    with Path("/dev/shm", name).open("r+b") as file, mmap.mmap(file.fileno(), 0) as arena:
        for index in range(pages):
            at = arena.find(page_of("alpha", 7, 1, index))
            if at >= 0:
                arena[at + world.stage.random.randrange(PAGE_BYTES)] ^= 1
                done += 1
    return done


def _arena_file(stage: Stage) -> None:
    cast = (Player("alpha"), Player("mallory", adversary("vandalism")))
    with stage.cluster(*cast, jail=stage.jail) as world:
        pool = world.play("alpha", task="fill", **_FILE).get("pool", 0)
        segment = (world.directory.path / "arena").read_text().strip().lstrip("/")
        # Told the name of the segment, which it could not know.
        world.attack(
            "mallory",
            by=JAILED,
            cluster=world.cluster.plan.name,
            segment=segment,
            owner="alpha",
            pages=_PAGES,
        )
        world.check("alpha", pool=pool, **_FILE)


def _forged_pages(stage: Stage) -> None:
    volume = make_volume(stage, "alpha", "mallory")
    _poison_volume(stage, volume, volume.grants(), verify=stage.defence)


def _reader_node(stage: Stage) -> None:
    volume = make_volume(stage, "alpha", "mallory")
    role = "reader" if stage.defence else "writer"
    _poison_volume(stage, volume, volume.grants(mallory=role), verify=False)


def _poison_volume(stage: Stage, volume: Volume, grants: list[Grant], *, verify: bool) -> None:
    cast = (
        volume.player("alpha", verify=verify),
        volume.player("mallory", "filepoison", verify=verify),
    )
    with stage.cluster(*cast, grants=grants, arena_bytes=4 * MIB) as world:
        world.begin("alpha", "read_all", **volume.reading(1))
        world.finish("alpha")
        world.attack("mallory", by=("not_writer",))
        world.begin("alpha", "read_all", **volume.reading(2))
        world.finish("alpha")
        counters = world.count_files("alpha")
        refused = (counters.get("verification") or {}).get("mismatches", 0)
        if refused:
            stage.tally.caught += refused
            stage.say(f"alpha: refused {refused} pages that are not what the disk holds")
            world.judge_reports("mallory")
        # A page that was kept has harmed nobody until somebody believed it.
        stage.tally.succeeded = stage.tally.victim_mismatches


def _fenced_node(stage: Stage) -> None:
    volume = make_volume(stage, "alpha", "bravo", "mallory", timing=_SOON_DEAD)
    cast = (
        volume.player("alpha"),
        volume.player("bravo"),
        volume.player("mallory", "sleeper"),
    )
    with stage.cluster(*cast, grants=volume.grants()) as world:
        world.expendable.add("mallory")
        world.begin("mallory", path="/file000", seconds=_DEAF_SECONDS)
        stage.say("mallory has read /file000 and holds its lock; it hears nobody from now on")
        world.execute("alpha", "cp", "/file001", "/file000")
        stage.say("alpha has changed /file000, when mallory had been declared dead")
        expected = world.execute("alpha", "sha256sum", "/file001").split()[:1]
        others = [f"/file{number:03}" for number in range(2, 18)]
        for _ in range(_LOOKS):
            found = world.execute("bravo", "sha256sum", "/file000").split()[:1]
            stage.tally.victim_checks += 1
            stage.tally.victim_mismatches += found != expected
            # Out of bravo's own page cache, so that it has to ask again.
            world.execute("bravo", "sha256sum", *others)
            stage.interrupts.sleep(0.2)
        stale = sum(pool["stale_pages"] for pool in world.ask("pools")["pools"])
        stage.tally.attempts += stale
        stage.tally.caught += stale
        stage.say(f"hypervisor: refused {stale} pages for their old tokens")


def _known_poisoner(stage: Stage) -> None:
    uuid = _uuid(stage)
    grants = [Grant(name, uuid) for name in ("alpha", "bravo", "mallory")]
    kept = _PAGES // 2
    with stage.cluster(*_cast("forgery"), grants=grants) as world:
        report = world.play("mallory", uuid=uuid.hex(), pages=_PAGES)
        stage.tally.attempts += report.get("attempts", 0)
        stage.say(f"mallory: {report.get('succeeded', 0)} wrong pages were kept")
        if stage.defence:
            _find_and_quarantine(stage, world)
        world.play("alpha", task="fill", uuid=uuid.hex(), **{**_FILE, "pages": kept})
        found = world.check("bravo", uuid=uuid.hex(), **_FILE)
        stage.tally.succeeded += found.get("mismatches", 0)


def _find_and_quarantine(stage: Stage, world: World) -> None:
    """What an administrator does who was told that a page is wrong."""
    pages = world.ask("page", oid=file_oid(7, 1).hex(), index=0)["pages"]
    names = sorted({page["guest"] for page in pages})
    stage.say(f"administrator: page 0 of the file was put by {', '.join(names) or 'nobody'}")
    if names != ["mallory"]:
        stage.problem("provenance does not tell who put the page")
        return
    answer = world.ask("quarantine", guest="mallory", also_deny=True)
    stage.tally.caught += answer["pages"]
    stage.say(
        f"administrator: quarantine; {answer['pages']} pages of mallory's can't be had any more, "
        f"{len(answer['denied'])} grants taken back"
    )


SCENARIOS: Final = (
    Scenario(
        "reader-puts",
        "poisoning",
        "forgery",
        "a member that may only read puts wrong bytes under another file's handle",
        "its role: a reader's put is refused (NOT_WRITER)",
        "mallory's role is writer",
        "In Xen whoever had joined a shared pool could put any page under any handle. Here each "
        "grant has a role, and a reader's puts and flushes are refused at every call.",
        _reader_puts,
    ),
    Scenario(
        "guessed-uuid",
        "poisoning",
        "forgery",
        "an outsider knows (or guesses) the uuid of a shared pool and joins it",
        "deny by default: the uuid is a name and no key (SHARED_DENIED)",
        "mallory is let in, as anybody was who knew the uuid when Xen had no authorization",
        "The first version took the 128-bit uuid, which stands in a superblock, for the key. Here "
        "the administrator names who may join; knowing the uuid gives nothing.",
        _guessed_uuid,
    ),
    Scenario(
        "revoked-member",
        "poisoning",
        "forgery",
        "a member whose grant was taken back goes on with the pool id that it has",
        "grants are asked at every call, not at joining only",
        "the grant is not taken back",
        "A right that is looked at once, when the pool is joined, can't be taken back from who has "
        "joined. Here the next call of mallory is refused.",
        _revoked_member,
    ),
    Scenario(
        "stale-pages",
        "poisoning",
        "latecomer",
        "a node that was fenced, and does not know it, puts pages that were right once",
        "fencing tokens: the put carries an older lock number than the file has seen (STALE_TOKEN)",
        "puts carry no token, as in Linux, where nodes were trusted to be on time",
        "A node is stopped for longer than its lease while it holds a lock. The others go on, one "
        "changes the file. When the node wakes up, everything it does looks right to itself. No "
        "checksum helps: the pages are whole. Only the order of the locks tells.",
        _stale_pages,
    ),
    Scenario(
        "fenced-node",
        "poisoning",
        "sleeper",
        "a node of a real cluster that hears nobody is declared dead, and puts what it has read",
        "fencing tokens from the real lock manager: the file's new holder has a higher one",
        None,
        "The same as stale-pages with everything real: heartbeats that stay out, a view without "
        "the node, its journal replayed, the lock granted anew. The node's process lives on and "
        "still has its queue.",
        _fenced_node,
    ),
    Scenario(
        "reused-inode",
        "poisoning",
        "forgery",
        "a file is cached and removed without a flush; its inode number is then another file's",
        "object ids have the inode's generation, so the new file never meets the old pages",
        "object ids have the inode number alone",
        "Cleancache took the inode number as the file's name, unless the file system supplied a "
        "handle. A number is used again; number and generation together are not.",
        _reused_inode,
    ),
    Scenario(
        "bit-rot",
        "poisoning",
        "vandalism",
        "bits flip in the memory of the arena itself, under pages of a victim",
        "a checksum beside each page: a damaged page is a miss, counted and audited",
        "the arena has no checksums",
        "Nobody attacks here but the memory. Who reads a page that fails its checksum gets a miss "
        "and reads its disk.",
        _bit_rot,
    ),
    Scenario(
        "arena-file",
        "poisoning",
        "vandalism",
        "a guest opens the arena's segment in /dev/shm and changes a victim's pages in it",
        "the jail: it can't list or open anything but its own disk and door (EACCES, EPERM)",
        "the guest runs without a jail, with all rights of the user that started it",
        "The arena is a file to the host's kernel. Random names and mode 0600 keep other users "
        "out, and not the processes of the same user; that takes a jail.",
        _arena_file,
    ),
    Scenario(
        "forged-pages",
        "poisoning",
        "filepoison",
        "a node with all rights puts wrong bytes for files of the volume that all nodes mount",
        "content verification: the file system knows a checksum of what the disk holds",
        "pages from tmem are believed",
        "This is the question that the talk answered with trust: the node is a member, holds the "
        "locks, its tokens are new, its pages whole. Only who knows what the disk holds can tell, "
        "and reports it: the audit log then says who put the page. "
        "Without that the poison even spreads: a victim that drops the page puts it back, now "
        "under its own name.",
        _forged_pages,
    ),
    Scenario(
        "reader-node",
        "poisoning",
        "filepoison",
        "a node that may only read the pool of its volume puts wrong bytes for its files",
        "its role: a reader's put is refused (NOT_WRITER)",
        "the node's role is writer",
        "A node whose files are of no use to the others needs no right to put. It still profits "
        "from what the others have put.",
        _reader_node,
    ),
    Scenario(
        "known-poisoner",
        "poisoning",
        "forgery",
        "a writer has put wrong bytes under another file's handle, and they lie there",
        "provenance and quarantine: who put this page is known, and all that it put goes at once",
        "nobody asks where the page came from",
        "A page has an origin: which guest's process put it, when, and under which token. "
        "'tmem pools --page' tells it and 'tmem quarantine --also-deny' disowns everything that "
        "the guest has put into shared pools, by one word each, and takes its grants back.",
        _known_poisoner,
    ),
)
