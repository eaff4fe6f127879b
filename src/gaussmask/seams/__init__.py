"""How a drop gets into a model of somebody else's, and what has to follow it there.

A seam is a place where a program can be changed without editing it: here the host's own patch dropout, or a hook.

    images --> embeddings --> tokens --> seam.py: drop --> kept tokens --> blocks --> ...
       '--> pixels.py: dropped before the projection            ^
            followers.py, biases.py: rotary tables, masks and biases lose the same rows
"""
