"""What is timed against each other, a module for each part of run.py: the drop by itself (`layer`), in a small forward
(`overhead`), in a training step (`step`), in CLIP (`clip`), and the images for it (`loader`). Each makes groups
(`groups`) of models whose sizes depend on the device (`sizes`). Beside them is what only a GPU shows (`drop_on_cuda`),
and open_clip's own program (`open_clip_launcher`), which open_clip_program.py starts.
"""
