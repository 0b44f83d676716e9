# The environment of lavis on NVIDIA GPUs: docker build -t lavis . && docker run --gpus all --ipc=host -v "$PWD/cache:/lavis/cache" -it lavis
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv make gcc g++ git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /lavis
COPY . .
RUN make install && .venv/bin/python -m pip install --no-cache-dir -c constraints.txt -e '.[deepspeed,quant,chat]'

ENV PATH=/lavis/.venv/bin:$PATH
CMD ["bash"]
