"""The projection of a pipeline checkpoint as model.pth: `python pipe_proj2pth.py --ckpt_dir DIR`."""

import sys

from lavis.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "pipe_proj2pth", *sys.argv[1:]]))
