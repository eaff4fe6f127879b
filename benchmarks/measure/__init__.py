"""How anything is measured, whatever it is: time in turns (`timing`), memory (`memory`) and launches (`launches`); in
which precision (`precision`) and on what machine (`machine`); and what the arithmetic alone would allow (`arithmetic`).
"""
