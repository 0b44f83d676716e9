"""Train a recipe: `python train.py --cfg-path RECIPE [--options key=value ...]`, alone or under torchrun."""

import sys

from lavis.cli import main

if __name__ == "__main__":  # data workers import this file again
    sys.exit(main(["train", *sys.argv[1:]]))
