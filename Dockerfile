# byeori on CUDA:
#   docker build -t byeori .
#   docker run --gpus all --rm -v "$PWD:/work" -v byeori-cache:/cache byeori sft --config run.yaml
# The host needs an NVIDIA driver for the CUDA release that torch is built for (torch brings its own CUDA libraries).
# Triton and the CPU kernels are compiled at run time, hence the compiler. Not built or tried on a GPU yet.
FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/byeori/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    BYEORI_CACHE=/cache/byeori \
    HF_HOME=/cache/huggingface

WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY src ./src
RUN python3 -m venv /opt/byeori \
    && pip install --constraint constraints.txt '.[demo,quant]' \
    && rm -rf /src

RUN useradd --create-home --uid 10001 byeori \
    && mkdir -p /cache /work \
    && chown byeori /cache /work
USER byeori
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["byeori"]
CMD ["--help"]
