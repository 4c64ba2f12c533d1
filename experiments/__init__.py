"""What the paper compares and tries beside its own system, each as a change from outside. First: outside.py, then
lessons.py, released.py, lora.py, cross.py, clip.py. The command run.py trains, examines and compares them all."""
