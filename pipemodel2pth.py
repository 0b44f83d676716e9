"""Projection and LLM of a pipeline checkpoint as unfreeze_llm_model.pth: `python pipemodel2pth.py --ckpt_dir DIR`."""

import sys

from lavis.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "pipemodel2pth", *sys.argv[1:]]))
