"""The jail of a guest: what is left to it before the first instruction of guest code.

Guest code (a workload, a command of `tmem exec`, an adversary) begins when the control socket is
first answered, and that is after `shut`.  To run hostile code in here name a module in the boot
spec (`guests.adversary` is the interface, with an example):

    GuestSpec(..., jail=JailSpec("auto"), adversary="guests.adversaries.flood")
    ask(guest socket, {"verb": "run", "workload": "adversary", "seed": 1, "parameters": {...}})
    ask(guest socket, {"verb": "status"})["report"]
"""

from __future__ import annotations
