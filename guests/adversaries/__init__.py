"""Guests that are up to no good: each attack a program of its own, run inside a guest.

`guests.adversary` says how one is run and what it has.  `tmem scenario list` shows what there is,
`tmem scenario run NAME` plays one against victims, and `tmem scenario attack MODULE key=value ...`
runs one by hand in a guest of a small cluster and prints what it reports.

Every program reports `attempts`, `succeeded` and `caught` as *it* sees them; whether anybody was
harmed is for the victims to say (`witness`, which is no adversary).  What is refused is refused
with a reason or an errno, which is reported, too.
"""
