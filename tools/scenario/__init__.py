"""Scenarios: attacks that people can watch, with the defence off and then on.

model       what is counted and shown, what follows
stage       a cluster of its own for each
scenario    what a scenario is
poisoning, spying, denial, breakout   the catalogue
catalogue   by name
play        one or all of them, and what is printed
"""
