"""Train a recipe over a pipeline: `torchrun --nproc_per_node=2 train_pipeline.py --cfg-path RECIPE --num-stages 2
[--options key=value ...]`.
"""

import sys

from lavis.cli import main

if __name__ == "__main__":  # data workers import this file again
    given = sys.argv[1:]
    sys.exit(main(["train", *given, "--options", "parallel.strategy=pipeline"]))
