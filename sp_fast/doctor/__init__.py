"""`sp-fast doctor`: what a broken environment lacks, and what sp_fast chooses in a working one.

``gather`` asks the machine, ``judge`` turns the facts into findings, and ``report`` prints them.
"""
