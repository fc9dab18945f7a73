"""tmem experiment classic: a small sweep with real guests, and what is computed from points."""

from __future__ import annotations

import io
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hypervisor.arena import frames_that_fit
from ipc.errors import ExitCode
from tests.support.clusters import short_folder, tmem_here
from tests.support.disks import is_on_disk, mount_of
from tests.support.tools import need_tool
from tools.experiment import classic
from tools.experiment.classic import MEASURES, QUICK, Plan, verdict
from tools.experiment.classic_page import page
from tools.experiment.classic_report import compare, complete, goals, markdown
from tools.experiment.modes import MODES, MODES_ON_DEMAND, Disks
from tools.experiment.svg import legend, line_plot, ticks
from tools.progress import SweepReporter
from tools.units import PAGE_BYTES

TINY = Plan(
    guests=2,
    share_bytes=3 << 20,
    tree_bytes=96 << 10,
    memory_pages=100,
    jobs=(1, 14),
    passes=1,
    swap_bytes=8 << 20,
    repeat=1,
    modes=("static", "tmem"),
)
POINT_KEYS = {
    "mode": str,
    "pressure": float,
    "seconds": float,
    "disk_reads_pages": int,
    "swap_in_pages": int,
    "swap_out_pages": int,
    "oom_kills": int,
    "mismatches": int,
    "hypervisor_cpu_seconds": float,
    "hdd_seconds": float,
    "ssd_seconds": float,
}


class Sweep:
    """What one run of the command left behind."""

    def __init__(self, folder: Path, found: dict[str, Any], errors: str, code: int) -> None:
        self.folder = folder
        self.found = found
        self.errors = errors
        self.code = code

    def point(self, mode: str, jobs: int) -> dict[str, Any]:
        (point,) = [
            point
            for point in self.found["points"]
            if (point["mode"], point["jobs"]) == (mode, jobs)
        ]
        return dict(point)


@pytest.fixture(scope="module")
def sweep(new_cluster_name: Callable[[], str]) -> Iterator[Sweep]:
    """Two modes at two levels, around the host's page cache where that can be."""
    need_tool("mke2fs")
    with short_folder() as folder:
        options = ["--direct"] if is_on_disk(folder) else []
        yield run_sweep(folder, TINY, new_cluster_name(), *options)


def run_sweep(folder: Path, plan: Plan, name: str, *options: str) -> Sweep:
    """`tmem experiment classic` of a small plan, with its results in `out`."""
    command = ("experiment", "classic", "--quick", "--json", "--seed", "3", "--out", "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classic, "QUICK", replace(plan, name=name))
        done = tmem_here(*command, *options, cwd=folder)
    assert done.stdout, done.stderr
    return Sweep(folder, json.loads(done.stdout), done.stderr, done.returncode)


@pytest.mark.cluster
def test_points_say_what_was_counted(sweep: Sweep) -> None:
    """One for each mode and level, with all that is documented, of the right kind."""
    points = sweep.found["points"]
    assert [(point["jobs"], point["mode"]) for point in points] == [
        (1, "static"),
        (1, "tmem"),
        (14, "static"),
        (14, "tmem"),
    ]
    for point in points:
        for key, kind in POINT_KEYS.items():
            assert isinstance(point[key], (kind, int)), key
        assert point["seconds"] > 0
        assert point["hdd_seconds"] > point["ssd_seconds"]
    assert [point["pressure"] for point in points[:2]] == [1.0, 1.0]
    assert points[2]["pressure"] == points[3]["pressure"] > 3
    assert sweep.found["plan"]["total_bytes"] == 6 << 20


@pytest.mark.cluster
def test_a_small_sweep_is_right_and_shows_the_difference(sweep: Sweep) -> None:
    """No byte is wrong; under pressure tmem spares the disks, without it there is nothing to do."""
    assert sweep.code == ExitCode.OK, sweep.errors
    assert sweep.found["mismatches"] == 0
    assert sweep.found["errors"] == []
    assert sweep.found["verified_bytes"] > 1 << 20
    static, tmem = sweep.point("static", 14), sweep.point("tmem", 14)
    swapped = static["swap_in_pages"] + static["swap_out_pages"]
    assert swapped > 100
    assert tmem["swap_in_pages"] + tmem["swap_out_pages"] < swapped / 2
    assert static["hypervisor_cpu_seconds"] == 0 < tmem["hypervisor_cpu_seconds"]
    assert tmem["tmem"]["pages_put"] > 0
    for mode in ("static", "tmem"):
        calm = sweep.point(mode, 1)
        assert calm["swap_in_pages"] == calm["swap_out_pages"] == 0
        assert calm["disk_reads_pages"] > 0
    assert sweep.found["compared"]["tmem"]["swap_saved"] > 0.5


@pytest.mark.cluster
def test_the_disk_below_is_measured(sweep: Sweep) -> None:
    """No page of images and swap was in the host's cache; the clock says what the disk took."""
    if not is_on_disk(sweep.folder):
        pytest.skip(f"{sweep.folder} is not on a disk")
    device, kind = mount_of(sweep.folder)
    assert sweep.found["disk"] == {
        "device": device,
        "file_system": kind,
        "host_cached_pages": sweep.found["disk"]["host_cached_pages"],
        "access_seconds": sweep.found["disk"]["access_seconds"],
    }
    # None: a kernel that has no figure.
    assert not sweep.found["disk"]["host_cached_pages"]
    for point in sweep.found["points"]:
        assert 0 < point["disk_access_seconds"] < 1
    for run in sweep.found["runs"]:
        # Of the slowest guest; each has a few of the accesses.
        least = run["ssd_seconds"] - 0.0001 * run["accesses"]
        most = run["ssd_seconds"] + run["disk_access_seconds"] * run["accesses"]
        assert least < run["direct_seconds"] < most
    report = (sweep.folder / "out" / "report.md").read_text()
    assert f"files on {kind} on {device}, and the host's page cache had " in report
    assert "| O_DIRECT s |" in report
    assert "never slower than static (O_DIRECT time)" in report


@pytest.mark.cluster
def test_the_report_needs_nothing_else(sweep: Sweep) -> None:
    """JSON, Markdown and a page whose plots are well-formed; nothing of the clusters is left."""
    out = sweep.folder / "out"
    assert json.loads((out / "results.json").read_text()) == sweep.found
    text = (out / "report.md").read_text()
    assert "disk reads saved" in text
    assert "76 % at the heaviest" in text
    html = (out / "report.html").read_text()
    plots = re.findall(r"<svg xmlns=.*?</svg>", html, re.DOTALL)
    assert len(plots) >= 6
    for plot in plots:
        assert len(ElementTree.fromstring(plot).findall(".//{*}polyline")) == 2
    assert not re.search(r'(src|href)="', html)
    (run,) = [path for path in (sweep.folder / "runs").iterdir() if path.name != "cache"]
    assert list(run.iterdir()) == []


@pytest.mark.cluster
def test_progress_says_what_is_on(sweep: Sweep) -> None:
    """A line for each run, on standard error."""
    assert "1/4 static at pressure 1" in sweep.errors
    assert re.search(r"4/4 tmem at pressure \d\.\d+, \d+ s left", sweep.errors)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--modes", "static,magic"], ExitCode.USAGE, "there is no mode 'magic'; there are static"),
        (["--modes", ""], ExitCode.USAGE, "there is no mode ''"),
        (["--guests", "0"], ExitCode.USAGE, "--guests"),
        (["--repeat", "0"], ExitCode.USAGE, "--repeat"),
        (["--seed", "-1"], ExitCode.USAGE, "--seed"),
        (["--guests", "many"], ExitCode.USAGE, "--guests"),
        (["--out", "file/out"], ExitCode.NO_INPUT, "can't make the folder file/out"),
        (["--guests", "100000"], ExitCode.UNAVAILABLE, "guests"),
        (["--direct", "--dir", "file"], ExitCode.NO_INPUT, "can't make the folder "),
        (["--modes", "tmem+ksm"], ExitCode.USAGE, "there is no mode 'tmem+ksm'"),
    ],
)
def test_bad_input_is_refused(
    arguments: list[str], code: ExitCode, text: str, tmp_path: Path
) -> None:
    """With one line, before anything is started."""
    (tmp_path / "file").write_text("")
    done = tmem_here("experiment", "classic", "--quick", *arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1


# --- from points that one can check


def point(mode: str, pressure: float, **figures: float) -> dict[str, Any]:
    """A point of made-up figures."""
    measured: dict[str, float] = {**dict.fromkeys(MEASURES, 0), "seconds": 10.0, **figures}
    for clock in ("hdd_seconds", "ssd_seconds"):
        measured[clock] = figures.get(clock, measured["seconds"])
    spread = {measure: [measured[measure], measured[measure]] for measure in MEASURES}
    jobs = round(10 * pressure)
    return {"mode": mode, "pressure": pressure, "jobs": jobs, "spread": spread, **measured}


POINTS = [
    point("static", 1.0, disk_reads_pages=100),
    point("tmem", 1.0, disk_reads_pages=100, seconds=11.0, hypervisor_cpu_seconds=0.1),
    point("static", 2.0, disk_reads_pages=1000, swap_in_pages=600, swap_out_pages=400, seconds=40),
    point(
        "tmem",
        2.0,
        disk_reads_pages=400,
        swap_in_pages=100,
        swap_out_pages=100,
        hypervisor_cpu_seconds=0.7,
    ),
]


def test_comparison_is_in_the_published_units() -> None:
    """At the heaviest pressure, against static of the same level."""
    found = compare(POINTS)["tmem"]
    assert found["pressure"] == 2.0
    assert found["reads_saved"] == pytest.approx(0.6)
    assert found["reads_saved_per_second"] == pytest.approx(60)
    assert found["swap_saved"] == pytest.approx(0.8)
    assert found["core_share"] == pytest.approx(0.07)
    assert found["us_per_io_saved"] == pytest.approx(500)
    assert found["time_lost"] == pytest.approx(0.1)
    assert found["slowest"]["seconds"] == (pytest.approx(0.1), 1.0)


def test_goals_are_judged_one_by_one() -> None:
    """Kept promises and a broken one; without static nothing is promised."""
    judged = goals(compare(POINTS))
    assert judged["reads_saved"]["holds"]
    assert judged["swap_saved"]["holds"]
    assert not judged["never_slower_seconds"]["holds"]
    assert judged["never_slower_seconds"]["pressure"] == 1.0
    few = goals(compare([*POINTS[:3], {**POINTS[3], "swap_in_pages": 141}]))
    assert not few["swap_saved"]["holds"]
    assert goals(compare(POINTS[1::2])) == {}


def test_a_wrong_page_fails_the_experiment() -> None:
    """Whatever was saved; and so does a run that did not end well."""
    run = {"mode": "tmem", "jobs": 8, "mismatches": 2, "mismatch_paths": ["cc /a.py page 3"]}
    code, lines = verdict({"errors": [], "runs": [run]})
    assert code == ExitCode.VIOLATED
    assert lines == ["tmem, 8 jobs: 2 wrong pages or files: cc /a.py page 3"]
    assert verdict({"errors": ["guest1 died"], "runs": []}) == (ExitCode.VIOLATED, ["guest1 died"])
    assert verdict({"errors": [], "runs": []}) == (ExitCode.OK, [])


def test_one_mode_alone_has_a_report_too() -> None:
    """Without anything to compare it with."""
    plan = {**vars(TINY), "total_bytes": 4 << 20, "host_reserve_bytes": 1 << 19}
    found = complete({"points": POINTS[1::2], "runs": [], "errors": [], "plan": plan})
    assert found["compared"] == {}
    assert "| 2 " in markdown(found)
    assert "<polyline" in page(found)


def test_levels_of_the_sweeps_differ_and_begin_without_pressure() -> None:
    """From 1, where all fits into half of a guest's memory, to more than twice of the memory."""
    for plan in (Plan(), QUICK):
        levels = [plan.pressure(jobs) for jobs in plan.jobs]
        assert levels == sorted(set(levels))
        assert levels[0] == 1.0
        assert levels[-1] > 4


def test_levels_modes_and_seeds_take_turns() -> None:
    """Every mode at a level before the next level, with the same seeds."""
    plan = replace(TINY, repeat=2, seed=5)
    assert list(plan.runs())[:5] == [
        (1, "static", 5),
        (1, "tmem", 5),
        (1, "static", 6),
        (1, "tmem", 6),
        (14, "static", 5),
    ]


@pytest.mark.parametrize("wanted", [False, True])
def test_what_is_asked_of_the_host_reaches_all_guests(tmp_path: Path, *, wanted: bool) -> None:
    """Disks around its page cache in any mode; merged RAM in the one mode that is for that."""
    host = replace(TINY, direct=wanted).host
    disks = {name: Disks(tmp_path, tmp_path, b"") for name in host.guests}
    for mode in (*MODES.values(), *MODES_ON_DEMAND.values()):
        assert {guest.direct for guest in mode.plan(host, disks).guests} == {wanted}
    merged = {name: mode.plan(host, disks) for name, mode in (MODES | MODES_ON_DEMAND).items()}
    assert [name for name, plan in merged.items() if all(guest.ksm for guest in plan.guests)] == [
        "tmem+ksm"
    ]
    tmem = replace(MODES_ON_DEMAND["tmem+ksm"], ksm=False)
    assert tmem == MODES["tmem"]


@pytest.mark.parametrize("mode", MODES)
def test_no_mode_has_more_memory_than_another(mode: str, tmp_path: Path) -> None:
    """RAM that guests begin with, and the arena, are at most M; what is lent counts once."""
    host = TINY.host
    names = host.guests
    disks = {name: Disks(tmp_path, tmp_path, b"") for name in names}
    plan = MODES[mode].plan(host, disks)
    told = {
        question["guest"]: question["size_bytes"]
        for question in plan.questions
        if question["verb"] == "balloon"
    }
    uncounted = MODES[mode].uncounted_bytes
    if MODES[mode].page_states:
        assert plan.arena_bytes is not None
        lent = frames_that_fit(plan.arena_bytes) * PAGE_BYTES
        assert lent == host.total_bytes + uncounted * len(names)
        return
    ram = sum(told.get(guest.name, guest.memory_bytes) - uncounted for guest in plan.guests)
    arena = plan.arena_bytes or 0
    if MODES[mode].lend:
        assert ram < arena == host.total_bytes
    elif MODES[mode].tmem:
        assert ram + arena == host.total_bytes
    else:
        assert ram == host.total_bytes


@pytest.mark.parametrize(
    ("most", "expected"),
    [(0, [0, 1]), (4, [0, 1, 2, 3, 4]), (9.5, [0, 2.5, 5, 7.5, 10]), (1234, [0, 500, 1000, 1500])],
)
def test_ticks_are_round(most: float, expected: list[float]) -> None:
    """From zero to the first that is not below the most."""
    assert ticks(most) == expected


def plot_of(**lines: list[tuple[float, float]]) -> ElementTree.Element:
    """A plot, as an XML reader has it."""
    return ElementTree.fromstring(line_plot("Reads & more", "pressure", "pages", lines))


def heights(plot: ElementTree.Element) -> list[list[float]]:
    """Of each line's points, from the top."""
    return [
        [float(place.split(",")[1]) for place in line.attrib["points"].split()]
        for line in plot.findall(".//{*}polyline")
    ]


def labels(plot: ElementTree.Element) -> list[str]:
    """All its texts."""
    return ["".join(text.itertext()) for text in plot.findall(".//{*}text")]


def test_values_far_apart_have_a_logarithmic_axis() -> None:
    """Decades are equally far apart, zero is at the bottom; a hundred to one is not yet far."""
    plot = plot_of(one=[(1, 0), (2, 0.01), (3, 0.1)], two=[(1, 1), (2, 10), (3, 20)])
    (zero, hundredth, tenth), (unit, ten, twenty) = heights(plot)
    assert zero - hundredth == pytest.approx(hundredth - tenth, abs=0.2)
    assert tenth - unit == pytest.approx(unit - ten, abs=0.2)
    assert zero > hundredth > tenth > unit > ten > twenty > 0
    assert "pages, log scale" in labels(plot)
    assert {"0", "0.01", "0.1", "1", "10", "20"} <= set(labels(plot))

    (zero, fifth, _full) = heights(plot_of(one=[(1, 0), (2, 1), (3, 100)]))[0]
    assert zero - fifth == pytest.approx((zero - _full) / 100, abs=0.1)
    assert "pages" in labels(plot_of(one=[(1, 0), (2, 1), (3, 100)]))


def test_lines_are_told_apart_without_colours() -> None:
    """Each of eight has a dash and marker that no other has; the legend shows the same."""
    names = [f"mode{number}" for number in range(8)]
    plot = plot_of(**{name: [(1.0, 5.0), (2.0, 6.0)] for name in names})
    lines = plot.findall(".//{*}polyline")
    markers = [path.attrib["d"] for path in plot.findall("{*}path")][::2]
    looks = [(line.get("stroke-dasharray"), d) for line, d in zip(lines, markers, strict=True)]
    assert len(set(looks)) == 8
    assert len({dash for dash, _ in looks}) == 8
    assert len({line.attrib["style"] for line in lines}) == 8
    shown = ElementTree.fromstring(f"<p>{legend(names)}</p>")
    assert [path.attrib["d"] for path in shown.iter("path")] == markers
    assert [line.get("stroke-dasharray") for line in shown.iter("line")] == [
        line.get("stroke-dasharray") for line in lines
    ]


def test_labels_of_levels_do_not_lie_on_each_other() -> None:
    """One that is too near to the one before is left out; its points are not."""
    plot = plot_of(one=[(1, 5), (1.02, 6), (4, 7)])
    assert len(heights(plot)[0]) == 3
    assert "1.02" not in labels(plot)
    assert {"1", "4"} <= set(labels(plot))


def test_the_page_fits_narrow_and_dark_screens() -> None:
    """Tables scroll by themselves, widths are the reader's, colours change with the ground."""
    plan = {**vars(TINY), "total_bytes": 4 << 20, "host_reserve_bytes": 1 << 19}
    found = complete({"points": POINTS, "runs": [], "errors": [], "plan": plan})
    html = page(found)
    assert '<meta name="viewport" content="width=device-width' in html
    assert html.count("<table>") == html.count('<div class="wide"><table>') == 2
    _light, dark = html.split("prefers-color-scheme: dark", 1)
    assert "--line-0: #f2f2f2" in dark
    assert "stroke:var(--line-0, #000000)" in html
    assert 'fill="currentColor"' in html
    assert "Killed for memory: none in any mode." in html
    assert "O_DIRECT" not in html
    assert '<td class="figure">1,000</td>' in html
    assert html.count('<tr class="begins">') == 1


def test_what_was_asked_for_and_could_not_be_is_told() -> None:
    """KSM that this machine has not; an unknown number of cached pages is not none."""
    plan = {**vars(TINY), "total_bytes": 4 << 20, "host_reserve_bytes": 1 << 19}
    spread = {"direct_seconds": [3.0, 3.0]}
    points = [{**one, "direct_seconds": 3.0, "spread": one["spread"] | spread} for one in POINTS]
    disk = {"device": "/dev/sda", "file_system": "xfs", "host_cached_pages": None}
    extra = {"ksm": {"why_not": "not on this kernel"}, "disk": disk | {"access_seconds": 0.0004}}
    document = {"points": points, "runs": [], "errors": [], "plan": plan}
    text = markdown(complete(document | extra))
    assert "* not measured: not on this kernel" in text
    assert "files on xfs on /dev/sda" in text
    assert "had an unknown number of pages of them" in text
    assert "no longer than 400 us" in text
    assert "never slower than static (O_DIRECT time): at worst +0.0%" in text


def test_a_mode_of_the_heaviest_level_alone_is_compared_there() -> None:
    """It has no time at low pressure to have lost."""
    only = {**POINTS[3], "mode": "tmem+ksm"}
    found = compare([*POINTS, only])["tmem+ksm"]
    assert found["reads_saved"] == pytest.approx(0.6)
    assert found["time_lost"] is None


def test_time_left_is_judged_by_the_runs_so_far() -> None:
    """Nothing before the first is done, minutes when it is long."""
    seconds = iter([0.0, 0.0, 20.0, 20.0])
    stream = io.StringIO()
    reporter = SweepReporter(stream, quiet=False, now_seconds=lambda: next(seconds))
    reporter.step(0, 4, "static")
    assert reporter.left(1, 4) == "0 s left"
    reporter.step(2, 4, "tmem")
    assert reporter.left(1, 100) == "33 min left"
    assert stream.getvalue() == f"1/4 static{os.linesep}3/4 tmem, 20 s left\n"
