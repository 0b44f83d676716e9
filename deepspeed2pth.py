"""The model of a ZeRO checkpoint as model.pth: `python deepspeed2pth.py --ckpt_dir DIR`."""

import sys

from lavis.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "deepspeed2pth", *sys.argv[1:]]))
