"""The mathematics, as functions of tensors that know no model; `gaussmask.functional` is its face.

    grid --> scores.py: coordinates, scores --> top.py: the K highest --> tokens.py: their rows
                                                                     '-> patches.py: their pixels

All of it in one call: draw.py. How often each patch is kept: probability.py. What a bad argument gets: checks.py.
"""
