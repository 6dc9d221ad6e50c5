"""The one benchmark harness, used by ``logitless bench`` and by everything under ``bench/``.

One file an idea: `cases` (what is measured: shapes, presets, inputs), `contenders` (who is
measured), `timing` (interleaved and sustained clocks, paired ratios), `memory` (peak growth, in a
clean process), `accuracy` (error against float64) and `machine` (the facts that every table
states).
"""
