# Builds with any index that serves torch. On x86-64 Linux the default index serves its CUDA build,
# which makes the GPU image. For the small CPU image let pip see the CPU build, in a mounted folder
# of wheels (PIP_FIND_LINKS) or at another index (PIP_EXTRA_INDEX_URL):
#   docker build -t qsphere --build-arg PIP_EXTRA_INDEX_URL=... .
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG PIP_FIND_LINKS
ARG PIP_EXTRA_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY constraints.txt ./
RUN python3 -m venv /opt/qsphere \
 && /opt/qsphere/bin/pip install --no-cache-dir -c constraints.txt torch
# dependencies first: a change of code or text alone installs nothing else again
COPY pyproject.toml ./
COPY bidsapp/__init__.py bidsapp/
RUN touch README.md LICENSE NOTICE \
 && /opt/qsphere/bin/pip install --no-cache-dir -c constraints.txt . \
 && /opt/qsphere/bin/pip check
COPY README.md LICENSE NOTICE ./
COPY bidsapp bidsapp
# What no run needs: tests of libraries, 0.2 GB (but for those of nilearn, which imports some of them),
# and what deepbet, of which only the weights are read, requires: a GUI toolkit and LGPL libraries.
RUN /opt/qsphere/bin/pip install --no-cache-dir --no-deps --force-reinstall . \
 && /opt/qsphere/bin/pip uninstall -q -y connected-components-3d customtkinter darkdetect \
      fastremap fill_voids \
 && /opt/qsphere/bin/pip uninstall -q -y setuptools pip \
 && rm -rf /opt/qsphere/bin/deepbet-* \
           /opt/qsphere/lib/python3*/site-packages/torch/include \
           /opt/qsphere/lib/python3*/site-packages/torch/test \
 && find /opt/qsphere/lib/python3*/site-packages -type d -name tests \
      -not -path '*/nilearn/*' -prune -exec rm -rf {} +

FROM ${BASE}
LABEL org.opencontainers.image.title="QSphere" \
      org.opencontainers.image.description="Makes diffusion MRI from many scanners comparable and useful (BIDS-App)" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/qsphere/qsphere"
COPY --from=build /opt/qsphere /opt/qsphere
# everything that a library may want to write goes to the temporary folder, so that the root may be
# read-only and the user any; LOGNAME because a number without a name has no entry to look up
ENV PATH=/opt/qsphere/bin:$PATH \
    HOME=/tmp \
    LOGNAME=qsphere \
    MPLCONFIGDIR=/tmp/matplotlib \
    TEMPLATEFLOW_HOME=/tmp/templateflow \
    NO_ET=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONNOUSERSITE=1 \
    QSPHERE_CONTAINER=docker
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["qsphere"]
