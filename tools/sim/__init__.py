"""A whole cluster in one process: every event drawn from one seed, every promise checked.

    tmem sim SEED            one run, a summary
    tmem sim SEED --verbose  and a line an event
    tmem sim SEED --seeds 1000

The hypervisor is the real machine over an arena, the guests are real clients over the `local`
transport: programs with pools of all four kinds, cleancache clients, and in some runs a kernel with
its page cache on an ext2 image.  Around every call something may go wrong (`faults`): the request
or the reply is late and others go first, the hypervisor dies before or after the call, with or
without its memory, the guest dies.  Between calls the administrator does what it may do.

What holds after every event
  * `hypervisor.invariants.check` finds nothing;
  * the ledger agrees: it sees every call at the moment it is executed, so it knows what each page
    must hold and each reply must say (`ledger`);
  * every guest finds its own data right, as far as it can know with calls of unknown fate.

One seed is one history, in every process on every machine of this Python version: no clock but a
simulated one, no randomness but the seed's, and no order that depends on Python's hash seed.

A line of `--verbose`, in fixed columns

       412 app1.3@2    get    1:ES     4:0x20+32     31/32 miss          e  91 p  12 f   3 LATE
       |   |           |      |        |             |     |             |     |     |   |
       |   |           |      |        |             |     |             |     |     |   fault
       |   |           |      |        |             |     |             |     |     free frames
       |   |           |      |        |             |     |             |     persistent pages
       |   |           |      |        |             |     |             ephemeral pages
       |   |           |      |        |             |     status, or the reason of a refusal
       |   |           |      |        |             pages that were served, of how many
       |   |           |      |        object (its low 32 bits), index + count
       |   |           |      pool id, and kind: E or P, then P private or S shared
       |   |           operation, or event
       |   guest: name.life, @ generation of the hypervisor that it is attached to
       event

  Lines that are no calls have words in place of pool and object.  A fault stands in the line of the
  call that it happened to; LATE calls are shown where they were executed.  `f` is `down` while
  there is no hypervisor.
"""
