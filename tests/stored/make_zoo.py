"""Writes the figures of the zoo at the present version: `python tests/stored/make_zoo.py`."""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import zoo

if __name__ == "__main__":
    stored = {}
    for make in zoo.MODELS:
        found = zoo.figures(*zoo.build(make))
        stored |= {f"{make.__name__}/{name}": values for name, values in found.items()}
        print(f"{make.__name__}: bound {found['bound']:.6f}, radius {found['radius'].mean():.4f}, {len(found)} figures")
    np.savez_compressed(pathlib.Path(__file__).with_name("zoo.npz"), **stored)
