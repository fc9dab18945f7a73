"""What a run says: rows, ratios, the JSON file and the table."""

from __future__ import annotations

from typing import Any

from tools.bench import cprogram
from tools.bench.run import AGED, Outcome, Samples
from tools.bench.timing import NOISY_SHARE, Figures, median

Pick = dict[str, Figures]
"""One repetition: row name -> figures."""


def rows(outcome: Outcome) -> list[dict[str, Any]]:
    """A record a row and pinning; `spread` is the range of the repetitions' medians, in `unit`."""
    records = []
    for pinned, samples in outcome.samples.items():
        for name, repetitions in sorted(samples.items()):
            medians = [figures.median_us for figures in repetitions]
            record: dict[str, Any] = {
                "name": name,
                "pinned": pinned,
                "median": round(median(medians), 3),
                "p99": round(median([figures.p99_us for figures in repetitions]), 3),
                "unit": "us/call",
                "spread": round(max(medians) - min(medians), 3),
                "repetitions": len(repetitions),
            }
            rates = [f.pages_per_second for f in repetitions if f.pages_per_second]
            if rates:
                record["pages_per_second"] = round(median(rates))
            costs = [f.server_us_per_page for f in repetitions if f.server_us_per_page is not None]
            if costs:
                record["server_us_per_page"] = round(median(costs), 3)
            for key in repetitions[0].extra:
                record[key] = round(median([figures.extra[key] for figures in repetitions]), 4)
            records.append(record)
    return records


def _both(pick: Pick, ours: str) -> float | None:
    """Pages a second of as many gets as puts."""
    get = pick.get(ours.format("get"))
    put = pick.get(ours.format("put"))
    if get is None or put is None or not get.pages_per_second or not put.pages_per_second:
        return None
    return 2 / (1 / get.pages_per_second + 1 / put.pages_per_second)


def _cost(pick: Pick, note: str = "") -> float | None:
    costs = [pick[f"tmem {verb} extent 32{note}"].server_us_per_page for verb in ("get", "put")]
    known = [cost for cost in costs if cost is not None]
    return sum(known) / 2 if len(known) == 2 else None


def _over(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def _faster(pick: Pick, verb: str) -> float | None:
    peer = pick.get(f"redis {verb} 1")
    return None if peer is None else _over(peer.median_us, pick[f"tmem {verb} 1"].median_us)


def _of_one(pick: Pick) -> dict[str, float | None]:
    """The ratios of one repetition."""
    mq = pick[cprogram.MQ].median_us if cprogram.MQ in pick else None
    copy = pick[cprogram.MEMCPY].median_us if cprogram.MEMCPY in pick else None
    extents = {count: _both(pick, f"tmem {{}} extent {count}") for count in (32, 64)}
    found: dict[str, float | None] = {
        "get_vs_c_mq": _over(pick["tmem get 1"].median_us, mq),
        "put_vs_c_mq": _over(pick["tmem put 1"].median_us, mq),
        "get_vs_redis": _faster(pick, "get"),
        "put_vs_redis": _faster(pick, "put"),
        "extent_vs_memcpy": _over(_cost(pick), copy),
        "extent_hypervisor_us_per_page": _cost(pick),
        "extent_pages_per_second": extents[32],
        "aged_hypervisor_us_per_page": _cost(pick, AGED),
        "aged_pages_per_second": _both(pick, f"tmem {{}} extent 32{AGED}"),
    }
    for count, key in ((32, "extent"), (64, "extent64")):
        for peer in ("redis", "memcached", "lmdb"):
            found[f"{key}_vs_{peer}"] = _over(extents[count], _both(pick, f"{peer} {{}} {count}"))
    return found


def ratios(samples: Samples) -> dict[str, float | None]:
    """Medians over the repetitions of each repetition's ratio; None where a peer was skipped."""
    repetitions = min(len(list_) for list_ in samples.values())
    each = [
        _of_one({name: list_[number] for name, list_ in samples.items()})
        for number in range(repetitions)
    ]
    result: dict[str, float | None] = {}
    for key in each[0]:
        known = [value for one in each if (value := one[key]) is not None]
        result[key] = round(median(known), 4) if known else None
    return result


MEANING = {
    "get_vs_c_mq": "median of one 4 KiB get / median of the C ping-pong; goal at most 1.2",
    "put_vs_c_mq": "median of one 4 KiB put / median of the C ping-pong",
    "get_vs_redis": "redis-py's GET of 4 KiB / one 4 KiB get, medians; goal unpinned at least 20",
    "put_vs_redis": "redis-py's SET of 4 KiB / one 4 KiB put, medians",
    "ring_get_vs_c_mq": "ring, one core: one get / C ping-pong; goal at most 1.2",
    "ring_put_vs_c_mq": "ring, one core: one put / C ping-pong",
    "yields_vs_c_mq": "one core: two processes in Python that only yield / C ping-pong: the floor",
    "mqueue_get_vs_c_mq": "queues, one core: one get / C ping-pong; goal at most 1.7",
    "mqueue_put_vs_c_mq": "queues, one core: one put / C ping-pong; goal at most 1.7",
    "ring_get_two_cores_vs_c_mq": "ring, two cores: one get / C ping-pong; goal at most 0.5",
    "ring_get_beside_hogs_vs_mqueue": (
        "means of one get with a hog on each core, ring / queues; goal at most 1.5"
    ),
    "idle_cpu_share": "processor time of a hypervisor whose guests do nothing; goal below 0.001",
    "extent_vs_redis": "pages/s of extents of 32 / Redis at 32 keys; goal at least 7",
    "extent_vs_memcached": "pages/s of extents of 32 / memcached at 32 keys; goal at least 9",
    "extent_vs_lmdb": "pages/s of extents of 32 / lmdb at 32 keys (no server, no second process)",
    "extent64_vs_redis": "the same at 64; goal at least 8",
    "extent64_vs_memcached": "the same at 64; goal at least 10",
    "extent64_vs_lmdb": "the same at 64",
    "extent_vs_memcpy": "hypervisor time per page of extents of 32 / C memcpy of a cold page",
    "extent_hypervisor_us_per_page": "hypervisor time per page, extents of 32; goal 0.35 us",
    "extent_pages_per_second": "pages/s of extents of 32, as many gets as puts",
    "aged_hypervisor_us_per_page": "the same in an arena that single and scattered puts fragmented",
    "aged_pages_per_second": "the same in an arena that single and scattered puts fragmented",
    "metadata_fraction": "all metadata / arena, 1,024-page objects; goal at most 0.01",
    "metadata_fraction_small_files": "the same for objects of three pages",
    "metadata_fraction_shared": "the same, 1,024-page objects of a shared pool, 10 % changed since",
}


def document(outcome: Outcome) -> dict[str, Any]:
    """What `latest.json` holds."""
    pinned = ratios(outcome.samples[True])
    pinned.update(outcome.transport_ratios)
    pinned["metadata_fraction"] = outcome.metadata[0]["metadata_fraction"]
    pinned["metadata_fraction_small_files"] = outcome.metadata[1]["metadata_fraction"]
    pinned["metadata_fraction_shared"] = outcome.metadata[2]["metadata_fraction"]
    lost = median(outcome.lost)
    return {
        "rows": rows(outcome),
        "transport_rows": outcome.transport_rows,
        "bounded_rows": outcome.bounded_rows,
        "ratios": pinned,
        "ratios_unpinned": ratios(outcome.samples[False]),
        "meaning": MEANING,
        "metadata": outcome.metadata,
        "core": outcome.core,
        "lost_share": round(lost, 4),
        "noisy": lost > NOISY_SHARE,
        "skipped": [{"name": one.name, "reason": one.reason} for one in outcome.skipped],
    }


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _line(found: dict[str, Any]) -> list[str]:
    rate = found.get("pages_per_second")
    return [
        _number(found["median"]),
        _number(found["p99"]),
        _number(found["spread"]),
        _number(rate / 1000 if rate else None, 0),
        _number(found.get("server_us_per_page")),
    ]


def table(content: dict[str, Any]) -> list[list[str]]:
    """The rows as cells, the heading first: pinned figures, then unpinned ones."""
    heads = ["us/call", "p99", "spread", "kpages/s", "cpu us/page"]
    cells = [["", *heads, *(f"{head} (free)" for head in heads)]]
    by_key = {(row["name"], row["pinned"]): row for row in content["rows"]}
    for name in sorted({row["name"] for row in content["rows"]}):
        cells.append([name])
        for pinned in (True, False):
            cells[-1] += _line(by_key[name, pinned])
    return cells


def transport_table(content: dict[str, Any]) -> list[list[str]]:
    """The transports' rows as cells, the heading first."""
    cells = [["", "", "us/call", "p99", "spread", "mean", "cpu us/page"]]
    for row in content["transport_rows"]:
        figures = (row["median"], row["p99"], row["spread"], row.get("mean"))
        cost = _number(row.get("server_us_per_page"))
        cells.append([row["setting"], row["name"], *(_number(one) for one in figures), cost])
    return cells


def ratio_table(content: dict[str, Any]) -> list[list[str]]:
    """The ratios as cells, the heading first."""
    cells = [["", "pinned", "free", "what it is"]]
    for key, value in content["ratios"].items():
        free = content["ratios_unpinned"].get(key)
        cells.append([key, _number(value, 3), _number(free, 3), content["meaning"][key]])
    return cells
